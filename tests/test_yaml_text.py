"""YAML of settings: whatever a file or --set holds, it is read, or refused with a reason."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import pytest

from flows.cli.options import read_overrides
from qwen3ft.config import load_config
from qwen3ft.errors import ConfigError
from qwen3ft.yaml_text import LONGEST_TEXT, load_yaml


def alias_bomb() -> str:
    """Return ten lines that stand for three billion numbers."""
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(["a0: &a0 [1, 2, 3]", *lines, "model_name: *a9"])


# what is wrong, and the words that say so
REFUSED = {
    "alias bomb": (alias_bomb(), "line 2, column 10: an alias"),
    "one alias": ("seed: &one 1\nlora_r: *one", "line 2, column 9: an alias"),
    "merged mappings": ("a: &a {lora_r: 1}\nb:\n  <<: *a", "an alias"),
    "a mapping of itself": ("&a columns: *a", "an alias"),
    "lists in lists": (f"lora_r: {'[' * 20_000}", "more than 20 levels"),
    "closed lists in lists": (f"a: {'[' * 20_000}{']' * 20_000}", "more than 20 levels"),
    "mappings in mappings": ("{a: " * 20_000, "more than 20 levels"),
    "items of items": ("- " * 20_000, "more than 20 levels"),
    "names of names": ("? " * 20_000, "more than 20 levels"),
    "deeper each line": ("\n".join(" " * n + "a:" for n in range(500)), "more than 20 levels"),
    "many digits": (f"seed: {'9' * 100_000}", "a number of 100000 characters"),
    "many hexadecimal digits": (f"seed: 0x{'f' * 100_000}", "a number of 100002 characters"),
    "many sexagesimal digits": (f"seed: 1{':59' * 40_000}", "a number of 120001 characters"),
    "a long fraction": (f"learning_rate: .{'1' * 100_000}", "a number of 100001 characters"),
    "a name twice": ("lora_r: 8\nseed: 1\nlora_r: 9", "line 3, column 1: lora_r is given twice"),
    "a name twice within": ("columns: {answer: a, answer: b}", "answer is given twice"),
    "no date": ("seed: 2024-99-99", "month must be in"),
    "no digits": ("seed: 0b_", "invalid literal"),
    "an object": ("seed: !!python/object/apply:os.system [ls]", "could not determine"),
    "a long tag": (f"seed: !<{'%41' * 40_000}> b", "could not determine"),
    "too long": (f"# {'x' * LONGEST_TEXT}\nseed: 1", "more than 131,072 characters"),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=list(REFUSED))
@pytest.mark.timeout(60)
def test_a_hostile_text_is_refused_in_a_file_and_in_set(
    tmp_path: Path, text: str, reason: str
) -> None:
    """The error has what, why and the next command, and is short enough to be read."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    for read in (lambda: load_config(path), lambda: read_overrides([f"seed={text}"])):
        with pytest.raises(ConfigError, match=reason) as caught:
            read()
        assert caught.value.why
        assert caught.value.next_command
        assert len(str(caught.value)) < 1500


def test_what_settings_need_is_read() -> None:
    """Numbers, texts, lists, mappings and dates come out as with any loader."""
    text = "a: 5.0e-5\nb: [1, x, null]\nc: {d: on}\ne: '*f'\ng: 2026-11-26\nh: 1_000\ni: 0x1f"
    assert load_yaml(text) == {
        "a": 5e-5,
        "b": [1, "x", None],
        "c": {"d": True},
        "e": "*f",
        "g": date(2026, 11, 26),
        "h": 1000,
        "i": 31,
    }


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.timeout(60)
def test_a_config_that_is_no_file_is_refused(tmp_path: Path, make: object) -> None:
    """A folder, a pipe that nobody writes to, a device without an end."""
    make(tmp_path / "config.yaml")  # type: ignore[operator]
    with pytest.raises(ConfigError, match="not a regular file"):
        load_config(tmp_path / "config.yaml")


def test_an_error_stays_short_whatever_was_given(tmp_path: Path) -> None:
    """5,000 unknown names, or one long value, are not all repeated."""
    path = tmp_path / "config.yaml"
    for text in ("\n".join(f"name{n}: 1" for n in range(5_000)), f"seed: {'x' * 100_000}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="invalid setting") as caught:
            load_config(path)
        assert len(str(caught.value)) < 10_000
