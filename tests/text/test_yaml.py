"""YAML of settings: whatever a file or --set holds, it is read, or refused with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.cli.options import read_overrides
from qwen3ft.config import load_config
from qwen3ft.errors import ConfigError
from qwen3ft.text.yaml import LONGEST_TEXT, load_yaml


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
    "a name twice": ("lora_r: 8\nseed: 1\nlora_r: 9", "line 3, column 1: lora_r is given twice"),
    "a name twice within": ("columns: {answer: a, answer: b}", "answer is given twice"),
    "an object": ("seed: !!python/object/apply:os.system [ls]", "column 7: a tag"),
    "a long tag": (f"seed: !<{'%41' * 40_000}> b", "column 7: a tag"),
    "a comment for a text": ("reasoning_separator: ####", "column 21: an empty value; null unsets"),
    "nothing for a text": ("ability_path:\nseed: 1", "an empty value"),
    "a tilde": ("ability_path: ~", "column 15: ~; null unsets"),
    "an empty item": ("data_paths:\n  -\n  - a", "an empty value"),
    "too long": (f"# {'x' * LONGEST_TEXT}\nseed: 1", "more than 131,072 characters"),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=list(REFUSED))
@pytest.mark.timeout(60)
def test_a_text_that_settings_may_not_be_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    """The error has what, why and the next command, and is short enough to be read."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(path)
    assert caught.value.why
    assert caught.value.next_command
    assert len(str(caught.value)) < 1500


LONG = {
    "many digits": f"{'9' * 100_000}",
    "many hexadecimal digits": f"0x{'f' * 100_000}",
    "many sexagesimal digits": f"1{':59' * 40_000}",
    "lists in lists": "[" * 500,
    "mappings in mappings": "{a:" * 500,
    "an alias bomb": alias_bomb(),
    "another date": "2024-99-99",
}


@pytest.mark.parametrize("text", LONG.values(), ids=list(LONG))
@pytest.mark.parametrize("name", ["seed", "max_memory_gb", "data_paths", "columns"])
@pytest.mark.timeout(60)
def test_a_hostile_value_is_refused_or_a_text(tmp_path: Path, name: str, text: str) -> None:
    """After --set and in a file; a number is never one that was not typed."""
    path = tmp_path / "config.yaml"
    path.write_text(f"{name}: {text}")
    for read in (
        lambda: load_config(path),
        lambda: load_config(None, read_overrides([f"{name}={text}"])),
    ):
        try:
            found = getattr(read(), name)
        except ConfigError as error:
            found, shown = None, str(error)
        else:
            shown = ""
        assert found in ((text,), tuple(text.split(","))) or "\nNext: " in shown
        assert len(shown) < 1500


def test_values_are_the_texts_that_were_written() -> None:
    """Only null is read; the setting decides what the rest means."""
    text = "a: 5.0e-5\nb: [1, x, null]\nc: {d: on}\ne: '*f'\ng: 2026-11-26\nh: 0x1f\ni: 'null'"
    assert load_yaml(text) == {
        "a": "5.0e-5",
        "b": ["1", "x", None],
        "c": {"d": "on"},
        "e": "*f",
        "g": "2026-11-26",
        "h": "0x1f",
        "i": "null",
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
