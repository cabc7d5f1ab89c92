"""The folder that a command works in, and what is typed in a folder below it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli.adapters import requested_adapter
from flows.cli.data import _data_config
from flows.cli.output import open_console
from flows.cli.plan import plan_command
from flows.cli.project import open_project
from flows.cli.views.data import show_preview
from qwen3ft.data.preview import ShownToken
from qwen3ft.data.sources import resolve_sources
from qwen3ft.errors import ConfigError, DataLoadingError, EnvironmentNotReadyError


@pytest.mark.parametrize(
    ("mark", "marks_below"),
    [
        ("qwen3ft.yaml", True),
        ("deployments/prefect.yaml", True),
        (".qwen3ft/secret", True),
        (".qwen3ft/cache/digests.json", False),
        ("data/rows.jsonl", None),
    ],
)
def test_a_project_is_marked_by_what_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str, marks_below: bool | None
) -> None:
    """What one look at some rows leaves in a home folder makes no project of all below it."""
    (tmp_path / mark).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mark).touch()
    below = tmp_path / "below"
    below.mkdir()
    monkeypatch.chdir(tmp_path)
    if marks_below is None:
        with pytest.raises(EnvironmentNotReadyError):
            open_project()
    else:
        assert open_project().root == tmp_path
    monkeypatch.chdir(below)
    assert open_project(anywhere=True).root == (tmp_path if marks_below else below)
    assert Path.cwd() == (tmp_path if marks_below else below)


def test_paths_of_data_are_relative_to_where_they_are_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patterns, missing files and home folders too; names of the hub and bundled rows stay."""
    (tmp_path / "qwen3ft.yaml").write_text("model_name: embedded\n")
    (tmp_path / "below" / "rows").mkdir(parents=True)
    (tmp_path / "below" / "rows" / "a.jsonl").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "below")
    typed = ["rows/*.jsonl", "rows", "~/x.jsonl", "openai/gsm8k", "embedded:train"]
    config = _data_config(typed, None, None)
    rows = str(tmp_path / "below" / "rows")
    assert config.data_paths == (
        *(f"{rows}/*.jsonl", rows, f"{tmp_path}/home/x.jsonl", "openai/gsm8k", "embedded:train"),
    )
    found, *_ = resolve_sources(config.model_copy(update={"data_paths": config.data_paths[:1]}))
    assert [file.path.name for file in found] == ["a.jsonl"]
    monkeypatch.chdir(tmp_path / "below")
    with pytest.raises(DataLoadingError, match=f"{tmp_path}/below/none.jsonl does not exist"):
        resolve_sources(_data_config(["none.jsonl"], None, None))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_heading_says_how_trained_tokens_are_shown(terminal: bool) -> None:
    stream = io.StringIO()
    console = open_console(file=stream, force_terminal=terminal, width=80, no_color=True)
    show_preview(console, 1, 2, [ShownToken("a", False), ShownToken("b", True)])
    assert ("(trained ones in green)" in stream.getvalue()) == terminal
    assert ("(trained ones between » and «)" in stream.getvalue()) != terminal


@pytest.mark.parametrize(
    "command",
    [
        lambda settings: plan_command(settings=settings),
        lambda settings: requested_adapter("champion", None, settings),
    ],
    ids=["plan", "generate"],
)
def test_a_notice_about_a_typed_setting_is_printed_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: Callable[[list[str]], object],
) -> None:
    """The command ends at the second setting."""
    (tmp_path / "qwen3ft.yaml").write_text("model_name: embedded\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="num_epochs"):
        command(["name=010", "num_epochs=-1"])
    assert "".join(capsys.readouterr()).count("name is the text '010'") == 1
