"""The command `init`: a project folder to work in, wherever qwen3ft is installed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.output import say

_DATA = Path("data")
_GIT_IGNORE = Path(".gitignore")
_IGNORED = (".qwen3ft/", ".venv/", "data/", "mlruns/", "prefect.toml", "qwen3-finetuned/", "runs/")
"""Paths with a secret, with what runs write, or with the user's own texts."""

_HEADER = """\
# Settings of the runs in this folder, for a machine {machine}. Written by `qwen3ft init`.
# The comments say what each setting trades; to try one for a single run: --set NAME=VALUE.
"""
_DATA_PATHS = "data_paths: [data]  # put your own files there, and remove data/sample.jsonl\n"


def init_command(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="The folder; made if it does not exist.")
    ] = Path(),
) -> None:
    """Make a project folder: settings, rows to try it with, and a .gitignore.

    Files that are there already stay as they are.
    """
    from deployments.deploy import PROJECT_FILE
    from qwen3ft.machine.gpus import visible_gpus
    from qwen3ft.text.commands import runnable, shell_line

    folder.mkdir(parents=True, exist_ok=True)
    is_new = not (folder / PROJECT_FILE).exists()
    if is_new:
        text = project_settings(has_gpu=bool(visible_gpus(os.environ)))
        _write_new(folder / PROJECT_FILE, text)
        say(f"{folder / PROJECT_FILE}  settings of runs")
    if is_new and not (folder / _DATA).exists():
        sample = folder / _DATA / "sample.jsonl"
        sample.parent.mkdir()
        _write_new(sample, _sample_rows())
        say(f"{sample}  questions and answers to try it with; replace them by yours")
    if _ignore_in_git(folder / _GIT_IGNORE):
        say(f"{folder / _GIT_IGNORE}  keeps data, runs and the servers' secret out of git")
    is_here = folder.samefile(Path())
    go = "" if is_here else f"{shell_line('cd', folder)} && "
    check, run = (
        runnable(f"qwen3ft {words}", elsewhere=not is_here) for words in ("data check", "run")
    )
    say(f"{'A project folder' if is_new else 'It was a project folder already'}. Next:")
    say(f"  {go}{check}   # what would be trained on")
    say(f"  {go}{run}   # train on it, with servers that keep the history")


def project_settings(*, has_gpu: bool) -> str:
    """Return the content of qwen3ft.yaml: the settings shipped for such a machine, and `data`."""
    from deployments.deploy import CPU_CONFIG, GPU_CONFIG, shipped_file

    text = shipped_file(GPU_CONFIG if has_gpu else CPU_CONFIG).read_text(encoding="utf-8")
    settings = re.sub(r"\A(#.*\n)+", "", text)  # its header speaks of that file
    if has_gpu:
        settings = re.sub(r"^data_paths: .*\n", _DATA_PATHS, settings, flags=re.MULTILINE)
    else:
        settings += f"\n{_DATA_PATHS}"
    machine = "with a CUDA GPU" if has_gpu else "without a CUDA GPU (its model is tiny)"
    return _HEADER.format(machine=machine) + settings


def _sample_rows() -> str:
    """Return the rows of the embedded model: jsonl with `question` and `answer`."""
    from qwen3ft.embedded import DATA_DIR

    files = (DATA_DIR / f"{split}.jsonl" for split in ("train", "dev", "test"))
    return "".join(file.read_text(encoding="utf-8") for file in files)


def _ignore_in_git(path: Path) -> bool:
    """Add what a .gitignore lacks; return True if that was something."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    missing = [line for line in _IGNORED if line not in text.splitlines()]
    if missing:
        before = f"{text.rstrip()}\n\n" if text.strip() else ""
        path.write_text(f"{before}# qwen3ft\n" + "\n".join(missing) + "\n", encoding="utf-8")
    return bool(missing)


def _write_new(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as stream:
        stream.write(text)
