"""A printed command is about the settings of what failed."""

from __future__ import annotations

import json
import os
import shlex
import sys

import pytest
import typer
from support.commands import flaw_of

from flows.cli import app, main
from qwen3ft.text.commands import with_typed

CASES = {
    "the file and the other settings": (
        "train --config my.yaml --set seed=3 --set gpus=8",
        "qwen3ft run --set gpus=4",
        "qwen3ft run --set gpus=4 --config my.yaml --set seed=3",
    ),
    "short options, equals signs, spaces": (
        "run -c 'my runs.yaml' -s 'data_paths=[a b]' --set=seed=3 --json",
        "qwen3ft plan --set lora_r=3",
        "qwen3ft plan --set lora_r=3 -c 'my runs.yaml' -s 'data_paths=[a b]' --set seed=3",
    ),
    "short options with their values": (
        "plan -sseed=3 -cmy.yaml -b12",
        "qwen3ft plan --set lora_r=3",
        "qwen3ft plan --set lora_r=3 -s seed=3 -c my.yaml -b 12",
    ),
    "a run that had not begun": (
        "train --set seed=3",
        "qwen3ft train",
        "qwen3ft train --set seed=3",
    ),
    "a plan of a shape": (
        "plan --model 4b --gpu h200 --seq 512 --set lora_r=9999",
        "qwen3ft plan --set lora_r=16",
        "qwen3ft plan --set lora_r=16 --model 4b --gpu h200 --seq 512",
    ),
    "an option for the setting that changes": (
        "plan --model 4b --budget 3 --gpu none",
        "qwen3ft plan --set max_memory_gb=5.0",
        "qwen3ft plan --set max_memory_gb=5.0 --model 4b --gpu none",
    ),
    "a GPU that is none": (
        "plan --gpu Voodoo --seq 512",
        "qwen3ft plan --gpu H200",
        "qwen3ft plan --gpu H200 --seq 512",
    ),
    "data": (
        "data check x.jsonl --config my.yaml --set model_name=embedded",
        "qwen3ft data check /d/x.jsonl --set model_name=embedded --set seed=3",
        "qwen3ft data check /d/x.jsonl --set model_name=embedded --set seed=3 --config my.yaml",
    ),
    "another model": (
        "run --config my.yaml",
        "qwen3ft plan --set model_name=Qwen/Qwen3-8B",
        "qwen3ft plan --set model_name=Qwen/Qwen3-8B",
    ),
    "a run that goes on": (
        "run --config my.yaml --set seed=3",
        "qwen3ft run --resume 1 --set max_memory_gb=3",
        "qwen3ft run --resume 1 --set max_memory_gb=3",
    ),
    "an adapter to be made public": (
        "push me/x --adapter 3 --license mit --set name=t",
        "qwen3ft push me/x --public",
        "qwen3ft push me/x --public --adapter 3 --license mit --set name=t",
    ),
    "a public push that is tried again": (
        "push me/x --public --adapter=3 --json",
        "qwen3ft push me/x",
        "qwen3ft push me/x --public --adapter 3",
    ),
    "a private push": ("push me/x", "qwen3ft push me/x", "qwen3ft push me/x"),
    "a server": (
        "serve --set name=faq --adapter 3 --host ::1 --port 9000 --key --engine vllm",
        "qwen3ft serve --engine own",
        "qwen3ft serve --engine own --set name=faq --adapter 3 --host ::1 --port 9000 --key",
    ),
    "a smaller server": (
        "serve -c my.yaml --engine own --slots 8 --context-tokens 9000 --queue 3",
        "qwen3ft serve --slots 1 --context-tokens 1024",
        "qwen3ft serve --slots 1 --context-tokens 1024 -c my.yaml --engine own --queue 3",
    ),
    "an adapter for another command": (
        "serve --adapter 3 --port 9000",
        "qwen3ft chat --set name=faq",
        "qwen3ft chat --set name=faq --adapter 3",
    ),
    "another adapter": (
        "export out --adapter champion --set name=faq",
        "qwen3ft chat --adapter /a/b",
        "qwen3ft chat --adapter /a/b --set name=faq",
    ),
    "an adapter for what takes none": (
        "chat --adapter 3 --set seed=3",
        "qwen3ft plan",
        "qwen3ft plan --set seed=3",
    ),
    "no settings": ("run --config my.yaml", "qwen3ft status", "qwen3ft status"),
    "another program": ("run --set seed=3", "ls -l 'a b'", "ls -l 'a b'"),
    "a text that was cut": ("run --set seed=3", "qwen3ft plan --set 'x", "qwen3ft plan --set 'x"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_next_command_keeps_what_was_typed(name: str) -> None:
    """But for what it sets itself, and unless it is about something else."""
    typed, command, kept = CASES[name]
    assert with_typed(command, shlex.split(typed)) == kept


def test_every_option_of_a_server_is_kept() -> None:
    """One that is added later, too."""
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = [each for each in serve.params if each.name not in ("config", "settings", "help")]
    for option in options:
        typed = [option.opts[0]] if option.is_flag else [option.opts[0], "1"]
        assert with_typed("qwen3ft serve", ["serve", *typed]).split()[2:] == typed


def test_the_command_line_keeps_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next command of a plan of a model's shape does not plan the project's run."""
    typed = "plan --model embedded --gpu none --seq 64 --set lora_r=999 --json"
    monkeypatch.setattr(sys, "argv", ["qwen3ft", *typed.split()])
    monkeypatch.setattr(os, "umask", lambda _: 0)  # of this process
    assert main() == 1
    command = json.loads(capsys.readouterr().out)["error"]["next_command"]
    assert command == "qwen3ft plan --set lora_r=16 --model embedded --gpu none --seq 64"
    assert flaw_of(command) == ""
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit, match="0"):
        main()
