"""Settings as they are typed: nothing becomes something else unseen, a typo is met with a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.deploy import GPU_CONFIG
from flows.cli.options import read_overrides
from flows.cli.views.settings import settings_markdown
from qwen3ft.config import TrainingConfig, load_config, merge_settings, parse_config
from qwen3ft.errors import ConfigError
from qwen3ft.jobs.folders import RunDir, write_record
from qwen3ft.operations.resumption import find_begun_run
from qwen3ft.settings import describe_settings, find_settings, read_setting

ROOT = Path(__file__).parents[1]

TEXTS = (
    *("####", "#", "# a", "a # b", "~", "no", "yes", "on", "off", "true", "1.e+3", "1_000", "010"),
    *("0x10", "1:30", "2026-11-26", ".inf", ".nan", "-", "- a", "a: b", "&a", "*a", "!a", "%", "@"),
    *("`", "|", ">", "=", "<<", "[", "{", "]", "'", '"', "?", "'it' or 'them'", "Null", "007"),
)
"""Words that YAML makes something else of, or refuses."""


def typed(*settings: str) -> TrainingConfig:
    return load_config(None, read_overrides(list(settings)))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["reasoning_separator", "output_dir", "ability_path"])
def test_a_text_is_taken_as_it_is_typed(
    name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And if YAML would have read it otherwise, that is said; ~ is the home folder in a path."""
    is_home = (name, text) in {("output_dir", "~"), ("ability_path", "~")}
    found = getattr(typed(f"{name}={text}"), name)
    assert found == (str(Path.home()) if is_home else text)
    assert f"{name} is the text {text!r}" in capsys.readouterr().err


def test_an_ordinary_text_needs_no_remark(capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does a number or a choice."""
    found = typed("output_dir=./out", "lora_r=8", "personal_data=off", "packing=on", "seed=7")
    assert (found.personal_data, found.packing) == ("off", "on")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("reasoning_separator='####'", "####"),
        ('reasoning_separator="\\n\\n"', "\n\n"),
        ("reasoning_separator='null'", "null"),
        ("reasoning_separator=null", None),
        ("data_paths=a,b", ("a", "b")),
        ("data_paths=[a, 'b,c', 010, no]", ("a", "b,c", "010", "no")),
        ("data_paths='a,b'", ("a,b",)),
        ("max_steps=010", 10),
        ("max_steps=null", None),
        ("learning_rate=1e-3", 1e-3),
        ("allow_degraded=yes", True),
    ],
)
def test_null_quotes_and_lists_are_read(setting: str, value: Any) -> None:
    """Everything else is text, and the setting decides what number or choice it is."""
    assert getattr(typed(setting), setting.partition("=")[0]) == value


@pytest.mark.parametrize(
    "setting",
    [
        *("max_steps=#5", "max_rows=# 5", "max_steps=0x10", "max_steps=1:30", "max_steps=~"),
        *("max_steps=", "ability_path=", "data_paths=", "data_paths=[a] # b", "data_paths=[a"),
        *("columns={question: }", "columns={question: ~}", "lora_r=1e3", "lora_r=true"),
        *("max_memory_gb=nan", "max_memory_gb=8e9", "max_memory_gb=thirteen", "output_dir=null"),
    ],
)
def test_what_has_no_meaning_is_refused(setting: str) -> None:
    """A comment is not null, and a number is never another one."""
    with pytest.raises(ConfigError) as caught:
        typed(setting)
    assert setting.partition("=")[0] in caught.value.what
    assert caught.value.next_command.startswith("qwen3ft settings")


@pytest.mark.parametrize(
    ("content", "value"),
    [("'####'", "####"), ("no", "no"), ("1e3", "1e3"), ("010", "010"), ("null", None)],
)
def test_a_text_in_a_file_is_what_is_written(tmp_path: Path, content: str, value: object) -> None:
    """The same as after --set."""
    path = tmp_path / "config.yaml"
    path.write_text(f"reasoning_separator: {content}  # a remark\n")
    assert load_config(path).reasoning_separator == value


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"lorar": 3}, "lora_r"),
        ({"epochs": 3}, "num_epochs"),
        ({"LearningRate": 3}, "learning_rate"),
        ({"data-paths": "a"}, "data_paths"),
        ({"columns": {"questoin": "q"}}, "question"),
    ],
)
def test_a_mistyped_name_is_met_with_the_right_one(given: dict[str, Any], meant: str) -> None:
    """In a file, after --set and in a run's parameters: all of them are parsed here."""
    with pytest.raises(ConfigError, match=f"did you mean {meant}\\?"):
        parse_config(given)


def test_a_name_that_resembles_none_gets_no_suggestion() -> None:
    """A wrong suggestion costs more than none."""
    with pytest.raises(ConfigError, match="there is no such setting") as caught:
        parse_config({"zzz": 1})
    assert "did you mean" not in caught.value.what
    assert caught.value.next_command == "qwen3ft settings"


def test_a_folder_below_the_home_folder_is_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell leaves the ~ of `--set runs_dir=~/runs` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("runs_dir", "cache_dir", "output_dir", "ability_path")
    config = parse_config({**dict.fromkeys(names, "~/x"), "fallback_output_dirs": ["~/x", "y"]})
    assert [getattr(config, name) for name in names] == [f"{tmp_path}/x"] * 4
    assert config.fallback_output_dirs == (f"{tmp_path}/x", "y")
    run = RunDir(tmp_path / "runs" / "r1")
    run.path.mkdir(parents=True)
    write_record(run.config, config)
    assert find_begun_run("~/runs", "r1").path == run.path


def test_given_settings_are_merged_over_those_of_the_deployment() -> None:
    """Column by column; but another model starts from the defaults."""
    base = {"model_name": "embedded", "lora_r": 16, "columns": {"question": "q", "answer": "a"}}
    merged = merge_settings(base, {"num_epochs": 2, "columns": {"answer": "b"}})
    assert merged == {**base, "num_epochs": 2, "columns": {"question": "q", "answer": "b"}}
    assert merge_settings(base, {"model_name": "embedded", "lora_r": 8})["columns"]
    other = {"model_name": "Qwen/Qwen3-0.6B"}
    assert merge_settings(base, other) == other


def test_the_page_of_settings_is_what_the_command_prints() -> None:
    """It is written by: qwen3ft settings --markdown > docs/settings.md."""
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_markdown(describe_settings((ROOT / GPU_CONFIG).read_text("utf-8")))


def test_every_setting_is_found_by_a_part_of_its_name() -> None:
    """With its default, its values, its meaning and its trade-off."""
    found = describe_settings((ROOT / GPU_CONFIG).read_text("utf-8"))
    assert [setting.name for setting in found] == list(TrainingConfig.model_fields)
    for setting in found:
        assert setting in find_settings(found, setting.name[1:].upper())
        assert setting.meaning
        assert setting.trade_off
        assert load_config(None, {setting.name: read_setting(setting.name, setting.default)})
    with pytest.raises(ConfigError, match="No setting is named 'reasning'") as caught:
        find_settings(found, "reasning")
    assert caught.value.next_command == "qwen3ft settings reasoning_separator"
