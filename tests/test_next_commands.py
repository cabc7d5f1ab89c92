"""Every error has a next command, and that command is accepted as it is printed."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import (
    ROOT,
    calls_without_next_command,
    error_sites,
    flaw_of,
    only_looks,
    run_here,
    template,
    words_of,
    written_commands,
)
from support.made_errors import RECORD_VARIABLE, recording
from support.mishaps import ELSEWHERE, QUICK, throw, write

from qwen3ft.config import load_config, parse_config
from qwen3ft.errors import FinetuneError, error_kinds
from qwen3ft.jobs.failure_rules import RULES
from qwen3ft.jobs.failures import translate_exit

LOOKING = ("ls", "df", "tail", "head")
"""Programs that change nothing: their commands are run as they are printed."""

LOOKING_LONGER = tuple(
    f"qwen3ft {words}" for words in ("status", "history", "doctor", "clean --dry-run", "sync")
)
"""Beginnings of our own commands that change nothing, and take a second or more."""

MADE_AS_A_RECORD = "qwen3ft/recovery/adjust.py _give_up 1"
"""What is made there is a `Failure`, from which the flow makes its error."""

FAILS_AGAIN = "qwen3ft/machine/environment.py EnvironmentManager._run 1"
"""The error about a program that failed quotes its end; its command shows all that it says."""

BEGINNINGS = ("qwen3ft plan --model",)
"""Words that the code completes; see tests/planning/test_refusal.py."""

COMPUTED = {
    # next commands that are no text in the call, by file: where their texts come from
    "qwen3ft/chat/templates.py": "the calls of template_error: texts in the code",
    "qwen3ft/config.py": "the settings that are looked up, and the calls of checked_name",
    "qwen3ft/data/hub.py": "_DATASET: texts in the code",
    "qwen3ft/data/refusal.py": "tests/data/test_no_rows.py, or texts in the code",
    "qwen3ft/data/sources.py": "tests/data/test_unseen.py: files that are not read",
    "qwen3ft/data/tokenizing.py": "command_to_check: looked at with the mishap",
    "qwen3ft/errors.py": "another error",
    "qwen3ft/jobs/failures.py": "RULES, below",
    "qwen3ft/machine/environment.py": "SETUP_COMMAND, or install_command",
    "qwen3ft/machine/gpu_lock.py": "texts in the code",
    "qwen3ft/machine/network.py": "an interface of this machine, or the program that shows them",
    "qwen3ft/machine/memory.py": "a text in the code",
    "qwen3ft/model/room.py": "run.resume_command, with a folder that has room",
    "qwen3ft/model/save_adapter.py": "the same",
    "qwen3ft/model/hub_errors.py": "RepoKind: texts in the code",
    "qwen3ft/planning/refusal.py": "tests/planning/test_refusal.py",
    "qwen3ft/recovery/adjust.py": "a text in the code, or that of the failure",
    "qwen3ft/recovery/shared_gpu.py": "texts in the code",
    "qwen3ft/serving/engines/vllm.py": "extra_command: tests/machine/test_installing.py",
    "qwen3ft/serving/gguf_files.py": "extra_command: tests/machine/test_installing.py",
    "qwen3ft/settings.py": "the settings",
    "qwen3ft/registry/aliases.py": "command_for_history: looked at with the mishap",
    "qwen3ft/registry/lookup.py": "the same",
    "qwen3ft/training/trainer.py": "command_to_train_again: looked at with the mishap",
    "deployments/prefect_api.py": "looked at with the mishap",
    "flows/api.py": "the same",
    "flows/cli/champion.py": "command_for_history, or words in the code",
    "flows/cli/data.py": "command_to_check: looked at with the mishap",
    "flows/hosts.py": "the command that resumes the run, or that of the host that refused",
    "flows/finetune.py": "the command that resumes the run, or a text in the code",
    "flows/resume.py": "the same",
    "qwen3ft/operations/resumption.py": "the same",
    "flows/cli/runs.py": "the run's error, or a text in the code",
}


@pytest.mark.parametrize("place", list(written_commands()))
def test_a_command_that_stands_in_the_code_exists(place: str) -> None:
    """With its options, its arguments, and settings of those names and kinds."""
    command = written_commands()[place]
    assert command in BEGINNINGS or flaw_of(command) == "", command


def test_every_error_has_a_next_command_that_can_be_looked_at() -> None:
    """A text that was checked above, words of one, or a source that is named here."""
    computed = set()
    for site in error_sites():
        command = site.next_command
        if isinstance(command, ast.Constant):
            assert flaw_of(str(command.value)) == "", site
        elif isinstance(command, ast.JoinedStr):
            assert flaw_of(template(command)) == "", site
        elif words := words_of(command):
            assert flaw_of(shlex.join(words)) == "", site
        else:
            computed.add(site.path)
            assert site.path in COMPUTED, f"name where the next command of {site} comes from"
    assert computed == set(COMPUTED)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind.__name__)
def test_the_next_command_of_a_foreign_error_exists(rule: Any) -> None:
    """Errors of libraries are translated by a table."""
    assert flaw_of(rule.next_command) == "", rule.next_command


def test_every_place_where_an_error_is_made_has_a_mishap() -> None:
    """One more error in the code needs one more way to provoke it, here or in another test."""
    places = {str(site) for site in error_sites()}
    assert QUICK.keys() | ELSEWHERE.keys() == places
    assert not QUICK.keys() & ELSEWHERE.keys()


def test_no_error_is_made_without_a_next_command() -> None:
    """Every call of a class of the tree is given one, or facts that hold one."""
    assert calls_without_next_command({kind.__name__ for kind in error_kinds()}) == []


@pytest.mark.parametrize("place", QUICK)
def test_a_mishap_ends_in_a_command_that_works(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What, why, and a command whose program, options, settings and paths stand as printed."""
    folder = tmp_path / "a folder"  # commands quote what a shell would divide
    folder.mkdir()
    made: list[tuple[str, FinetuneError]] = []
    with (
        recording(lambda site, error: made.append((str(site), error))),
        pytest.raises(FinetuneError) as caught,
    ):
        QUICK[place](folder)
    error = caught.value
    assert place == MADE_AS_A_RECORD or (place, id(error)) in [(s, id(each)) for s, each in made]
    assert error.what
    assert error.why
    assert flaw_of(error.next_command) == "", error.next_command
    if only_looks(error.next_command):
        assert run_here(error.next_command, folder) == 0
    if shlex.split(error.next_command)[0] in LOOKING:
        monkeypatch.chdir(folder)
        done = subprocess.run(["sh", "-c", error.next_command], capture_output=True, text=True)
        assert done.returncode == 0 or place == FAILS_AGAIN, done.stderr


@pytest.mark.slow  # a process for each command
@pytest.mark.timeout(600)
def test_commands_that_look_for_longer_work_in_a_project(tmp_path: Path) -> None:
    """Servers are down, so that `status` and `doctor` end with 1; none is misused or crashes."""
    (tmp_path / "qwen3ft.yaml").write_text("model_name: embedded\n")
    commands = set()
    for number, provoke in enumerate(QUICK.values()):
        folder = tmp_path / f"mishap {number}"
        folder.mkdir()
        try:
            provoke(folder)  # some only once in a process; each is tested above
        except FinetuneError as error:
            commands.add(error.next_command)
    looking = [command for command in commands if command.startswith(LOOKING_LONGER)]
    assert len(looking) > len(LOOKING_LONGER)
    for command in looking:
        words = [sys.executable, "-m", "qwen3ft", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        statuses = (0, 1) if command in ("qwen3ft status", "qwen3ft doctor") else (0,)
        assert done.returncode in statuses, command + done.stderr
        assert "Traceback" not in done.stderr, command + done.stderr


@pytest.mark.slow  # most of these tests train, start servers or wait
@pytest.mark.timeout(3600)
def test_errors_that_take_longer_are_provoked_where_it_says(tmp_path: Path) -> None:
    """Each in the test that is named for it, with what, why, and a command that is accepted."""
    record = tmp_path / "errors.jsonl"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "support.made_errors", "-m", ""]
    subprocess.run(
        [*command, *sorted(set(ELSEWHERE.values()))],
        cwd=ROOT,
        env={**os.environ, RECORD_VARIABLE: str(record), "PYTHONPATH": str(ROOT / "tests")},
        check=True,
    )
    errors = [json.loads(line) for line in record.read_text().splitlines()]
    for place, test in ELSEWHERE.items():
        found = [
            each for each in errors if each["place"] == place and each["test"].startswith(test)
        ]
        assert found, f"{test} does not provoke the error at {place}"
        for error in found:
            assert error["what"]
            assert error["why"], place
            assert flaw_of(error["next_command"]) == "", error["next_command"]


MORE: dict[str, Callable[[Path], Any]] = {
    "an unknown setting": lambda _: parse_config({"lorar": 3}),
    "a settings file of nothing": lambda folder: load_config(write(folder, "c.yaml", "")),
    "a killed worker": lambda _: throw(translate_exit(-9, "", oom_kills=0, phase="train")),
}
"""Other ways to a place of `QUICK`, whose command is another."""


@pytest.mark.parametrize("mishap", MORE)
def test_the_command_fits_the_mishap(mishap: str, tmp_path: Path) -> None:
    """Where one place in the code answers several mishaps."""
    with pytest.raises(FinetuneError) as caught:
        MORE[mishap](tmp_path)
    assert caught.value.why
    assert flaw_of(caught.value.next_command) == "", caught.value.next_command


def test_the_check_of_commands_finds_flaws() -> None:
    """A command, an option, an argument, a setting, a value: each of them may be wrong."""
    for command in (
        *("qwen3ft rnu", "qwen3ft run --resum 1", "qwen3ft export --rows FILE", "qwen3ft data"),
        *("qwen3ft run --set lorar=3", "qwen3ft plan --set lora_r=0", "qwen3ft plan --budget x"),
        *("no-such-program", "qwen3ft chat 'x", ""),
    ):
        assert flaw_of(command), command
    assert flaw_of("qwen3ft plan --set lora_r=3 --budget 4 --gpu none") == ""
