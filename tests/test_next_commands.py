"""Every error has a next command, and that command is accepted as it is printed."""

from __future__ import annotations

import ast
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import error_sites, flaw_of, template, words_of, written_commands

from deployments.schedule import check_schedule
from deployments.stack import Stack
from flows.cli.follow import find_run
from flows.cli.options import read_overrides
from flows.cli.plan import plan_command
from flows.cli.project import open_project
from flows.cli.servers import env_command
from flows.resume import refuse_second_resume
from flows.run_context import make_folders
from qwen3ft import faults
from qwen3ft.config import TrainingConfig, load_config, parse_config
from qwen3ft.data.sources import resolve_sources
from qwen3ft.errors import FinetuneError
from qwen3ft.evaluation.ability import read_ability_rows
from qwen3ft.files import require_disk
from qwen3ft.jobs.failure_rules import RULES
from qwen3ft.jobs.failures import folder_gone, translate, translate_exit
from qwen3ft.jobs.heartbeat import StopRequest
from qwen3ft.machine.gpu_lock import CPU, hold_gpu
from qwen3ft.machine.memory import over_budget
from qwen3ft.model.hub import resolve_model
from qwen3ft.model.saved_adapter import open_adapter
from qwen3ft.model.shapes import find_shape
from qwen3ft.operations.retention import RetentionPolicy, plan_removals
from qwen3ft.planning.gpu_specs import require_gpu_spec
from qwen3ft.registry.lookup import find_adapter
from qwen3ft.registry.registry import Registry
from qwen3ft.settings import find_settings

BEGINNINGS = ("qwen3ft plan --model",)
"""Words that the code completes; see tests/planning/test_refusal.py."""

COMPUTED = {
    # next commands that are no text in the call, by file: where their texts come from
    "qwen3ft/chat/templates.py": "the calls of template_error: texts in the code",
    "qwen3ft/config.py": "the settings that are looked up, and the calls of checked_name",
    "qwen3ft/data/hub.py": "_DATASET: texts in the code",
    "qwen3ft/data/refusal.py": "tests/data/test_no_rows.py, or texts in the code",
    "qwen3ft/data/sources.py": "tests/data/test_unseen.py: files that are not read",
    "qwen3ft/errors.py": "another error",
    "qwen3ft/jobs/failures.py": "RULES, below",
    "qwen3ft/machine/environment.py": "SETUP_COMMAND",
    "qwen3ft/machine/gpu_lock.py": "texts in the code",
    "qwen3ft/machine/memory.py": "a text in the code",
    "qwen3ft/model/room.py": "run.resume_command, with a folder that has room",
    "qwen3ft/model/save_adapter.py": "the same",
    "qwen3ft/model/hub_errors.py": "RepoKind: texts in the code",
    "qwen3ft/planning/refusal.py": "tests/planning/test_refusal.py",
    "qwen3ft/recovery/adjust.py": "a text in the code, or that of the failure",
    "qwen3ft/recovery/shared_gpu.py": "texts in the code",
    "qwen3ft/settings.py": "the settings",
    "flows/api.py": "the command that resumes the run",
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


def _config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(model_name="embedded", **changes)


def _adapter(folder: Path, wanted: str) -> Any:
    config = _config(output_dir=str(folder), runs_dir=str(folder / "runs"))
    return find_adapter(config, Registry(f"sqlite:///{folder / 'mlflow.db'}"), wanted)


def _abandon(folder: Path) -> Any:
    policy = RetentionPolicy(abandon=("nothing",))
    return plan_removals(_config(runs_dir=str(folder)), (), policy)


def _hold_twice(folder: Path) -> None:
    with (
        hold_gpu(CPU, "one", when_busy="wait", wait_seconds=1, folder=folder),
        hold_gpu(CPU, "two", when_busy="refuse", wait_seconds=0, folder=folder),
    ):
        pass


def _raise(error: FinetuneError) -> None:
    raise error


PROVOKED: dict[str, Callable[[Path], Any]] = {
    "a setting out of its bounds": lambda _: parse_config({"lora_r": 0}),
    "an unknown setting": lambda _: parse_config({"lorar": 3}),
    "a settings file that is missing": lambda folder: load_config(folder / "a file.yaml"),
    "a settings file of nothing": lambda folder: load_config(_file(folder, "c.yaml", "")),
    "a settings file with a list": lambda folder: load_config(_file(folder, "c.yaml", "[a]")),
    "a value that is empty": lambda _: read_overrides(["max_steps="]),
    "a word about no setting": lambda _: find_settings([], "nonsense"),
    "a planted fault that is none": lambda _: faults._parse("ooom"),
    "no project": lambda folder: _in(folder, open_project),
    "no servers": lambda folder: _in(_project(folder), env_command),
    "a run that nobody knows": lambda folder: find_run(Stack(folder).layout(), "nonsense"),
    "no run in progress": lambda folder: find_run(Stack(folder).layout(), None),
    "a schedule that is none": lambda _: check_schedule("61 * * * *", "UTC"),
    "a third crash": lambda _: refuse_second_resume(_config(), "1", 5),
    "a folder that cannot be made": lambda _: make_folders(_config(runs_dir="/dev/null/runs")),
    "a data path that is missing": lambda f: resolve_sources(_config(data_paths=(f"{f}/no",))),
    "a folder without data": lambda f: resolve_sources(_config(data_paths=(str(f),))),
    "a glob without files": lambda f: resolve_sources(_config(data_paths=(f"{f}/*.jsonl",))),
    "bundled rows of another name": lambda _: resolve_sources(
        _config(data_paths=("embedded:nonsense",))
    ),
    "no data": lambda _: resolve_sources(TrainingConfig()),
    "a file of another type": lambda f: resolve_sources(
        _config(data_paths=(str(_file(f, "a b.pdf", "x")),))
    ),
    "an unusable ability set": lambda f: read_ability_rows(_config(ability_path=f"{f}/no.jsonl")),
    "a full disk": lambda folder: require_disk(folder / "x", 2**60, "The run", "why"),
    "a folder that is gone": lambda folder: _raise(folder_gone(folder / "a b")),
    "any exception": lambda _: _raise(translate(ValueError("x"), "train")),
    "a killed worker": lambda _: _raise(translate_exit(-9, "", oom_kills=1, phase="train")),
    "a worker that was stopped": lambda _: _raise(StopRequest().error()),
    "a GPU that another run holds": _hold_twice,
    "a budget that is exceeded": lambda _: _raise(over_budget(2**33, 2**32, "cpu")),
    "a model that does not exist": lambda _: find_shape("no/model"),
    "a model that is not cached": lambda folder: resolve_model(
        TrainingConfig(model_name="owner/name", cache_dir=str(folder))
    ),
    "a folder that is no adapter": lambda folder: open_adapter(folder),
    "no champion": lambda folder: _adapter(folder, "champion"),
    "no such adapter": lambda folder: _adapter(folder, "no-such-run"),
    "a name that leads out": lambda folder: _adapter(folder, ".."),
    "a run to abandon that is none": _abandon,
    "a GPU that nobody knows": lambda _: require_gpu_spec("Voodoo"),
    "a budget that is too small": lambda _: plan_command(model="14b", budget=1, gpu="h200"),
}


def _file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def _in(folder: Path, call: Callable[[], Any]) -> Any:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return call()
    finally:
        os.chdir(before)


def _project(folder: Path) -> Path:
    (folder / "deployments").mkdir()
    (folder / "deployments" / "prefect.yaml").touch()
    return folder


@pytest.mark.parametrize("mishap", PROVOKED)
def test_a_mishap_ends_in_a_command_that_is_accepted(mishap: str, tmp_path: Path) -> None:
    """What, why, and a command whose program, options, settings and paths stand as printed."""
    folder = tmp_path / "a folder"  # commands quote what a shell would divide
    folder.mkdir()
    with pytest.raises(FinetuneError) as caught:
        PROVOKED[mishap](folder)
    assert caught.value.what
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
