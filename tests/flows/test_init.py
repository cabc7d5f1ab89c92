"""The settings that `qwen3ft init` writes, for a machine with and without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.cli.init import init_command, project_settings
from qwen3ft.config import TrainingConfig, parse_config


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_new_project_trains_on_its_data_folder(has_gpu: bool) -> None:
    """Everything else is as shipped for such a machine."""
    text = project_settings(has_gpu=has_gpu)
    config = parse_config(yaml.safe_load(text))
    assert config.data_paths == ("data",)
    assert config.is_embedded is not has_gpu
    if has_gpu:
        assert config == TrainingConfig(data_paths=("data",))
    assert text.splitlines()[0].endswith("Written by `qwen3ft init`.")


@pytest.mark.parametrize("folder", [".", "my project"])
def test_the_printed_commands_work_in_the_shell_that_shows_them(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a program that is not on PATH, here one that says where it was called, and for what."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    program = tmp_path / ".venv" / "bin" / "qwen3ft"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$(pwd): $*"\n')
    program.chmod(0o700)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    init_command(Path(folder))
    printed = capsys.readouterr()
    commands = [line for line in (printed.out + printed.err).splitlines() if line[:2] == "  "]
    assert len(commands) == 2
    said = [
        subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
        for command in commands
    ]
    there = (tmp_path / folder).resolve()
    assert said == [f"{there}: data check\n", f"{there}: run\n"]
