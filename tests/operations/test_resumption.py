"""A run is resumed with its own settings; what decides its result cannot change."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from deployments.deploy import choose_defaults
from flows.cli.options import read_overrides
from flows.cli.project import resume_parameters
from flows.resume import asked_for, settings_to_finish, settings_to_resume
from qwen3ft.config import TrainingConfig, merge_settings, parse_config
from qwen3ft.errors import ConfigError
from qwen3ft.jobs.folders import RunDir, write_record
from qwen3ft.operations.night import SETTINGS_THAT_DO_NOT_DECIDE, describe_request
from qwen3ft.operations.resumption import find_begun_run, own_settings, resumed_settings
from qwen3ft.settings import CHANGEABLE_SETTINGS

OTHER: dict[str, Any] = {
    "gpus": "2",
    "model_name": "Qwen/Qwen3-8B",
    "model_revision": "v2",
    "quantization": ["fp4"],
    "columns": {"question": "q"},
    "data_paths": ["b.jsonl"],
    "dev_paths": ["b.jsonl"],
    "test_paths": ["b.jsonl"],
    "reasoning_separator": "####",
    "ability_path": "ability.jsonl",
    "judge_url": "http://127.0.0.1:1/v1",
    "judge_model": "other",
    "judge_key_variable": "KEY",
    "fallback_output_dirs": ["elsewhere"],
    "notify_blocks": ["slack-webhook/ops"],
    "notify_on": ["failed"],
    "max_rows": 7,
    "max_rows_per_source": 7,
    "evaluate_every_steps": 7,
    "gate_confidence": 0.9,
    "max_steps": 7,
}
"""Another value of each setting whose type does not give one."""


def other_value(name: str, before: Any) -> Any:
    """Return a valid value of a setting that differs from `before`."""
    if name in OTHER:
        return OTHER[name]
    choices = TrainingConfig.model_json_schema()["properties"][name].get("enum")
    if choices:
        return next(choice for choice in choices if choice != before)
    match before:
        case bool():
            return not before
        case int():
            return before + 1
        case float():
            return before / 2 if before else 0.1
    return f"{before or ''}x"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Return a run with settings that are not the defaults."""
    made = RunDir(tmp_path / "runs" / "r1")
    made.path.mkdir(parents=True)
    settings = {"model_name": "embedded", "seed": 5, "learning_rate": 0.002, "lora_r": 4}
    folders = {"runs_dir": str(tmp_path / "runs"), "output_dir": "out"}
    write_record(made.config, parse_config({**settings, **folders, "judge_model": "mine"}))
    return made


@pytest.mark.parametrize("name", sorted(TrainingConfig.model_fields))
def test_every_setting_is_either_changed_or_refused(run: RunDir, name: str) -> None:
    """A refusal names both values, what may change, and the command without the change."""
    own = own_settings(run)
    value = other_value(name, getattr(own, name))
    if name in CHANGEABLE_SETTINGS:
        if name != "runs_dir":  # says where the run is found
            assert getattr(resumed_settings(run, {name: value}), name) != getattr(own, name)
        return
    with pytest.raises(ConfigError, match=name) as refused:
        resumed_settings(run, {name: value})
    assert "max_memory_gb" in refused.value.why
    assert refused.value.next_command == run.resume_command
    assert own_settings(run) == own


def test_a_value_that_the_run_has_already_is_no_change(run: RunDir) -> None:
    """Whatever repeats all settings, such as an automation, changes none."""
    own = own_settings(run)
    assert resumed_settings(run, own.model_dump(mode="json")) == own


def test_a_name_that_was_found_when_the_run_began_stays(run: RunDir) -> None:
    """An automation repeats what was asked for, in which no name was given."""
    named = own_settings(run).model_copy(update={"name": "older"})
    write_record(run.config, named)
    asked = {**named.model_dump(mode="json"), "name": None}
    assert resumed_settings(run, asked).name == "older"


def test_what_may_change_does_not_decide_the_result(run: RunDir, tmp_path: Path) -> None:
    """The digest of the request, by which nights and champions are compared, stays the same."""
    assert CHANGEABLE_SETTINGS.keys() <= SETTINGS_THAT_DO_NOT_DECIDE
    assert CHANGEABLE_SETTINGS.keys() <= TrainingConfig.model_fields.keys()
    own = own_settings(run).model_copy(update={"cache_dir": str(tmp_path / "cache")})
    changes = {
        name: other_value(name, getattr(own, name))
        for name in CHANGEABLE_SETTINGS
        if not name.endswith("_dir")
    }
    changed = parse_config({**own.model_dump(mode="json"), **changes})
    assert describe_request(changed).sha256 == describe_request(own).sha256


def test_the_printed_command_finds_the_run_wherever_it_lies(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the usual folder its id is enough; elsewhere the command names the folder."""
    words = shlex.split(run.resume_command)
    assert words[:4] == ["qwen3ft", "run", "--resume", "r1"]
    assert find_begun_run(read_overrides(words[5:])["runs_dir"], "r1") == run
    monkeypatch.chdir(tmp_path)
    assert run.resume_command == "qwen3ft run --resume r1"


def test_a_run_of_a_teams_servers_is_continued_there(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qwen3ft run` would start servers of the project's own, whose champion is another one.

    Over several hosts it is carried out by a worker: that of the run's own host is then busy, and
    takes no request for another host.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example.org/api")
    assert run.resume_command == "qwen3ft train --resume r1"
    again = "prefect deployment run qwen3-finetune/default --param continue_run=r1"
    write_record(run.config, own_settings(run).model_copy(update={"hosts": 3}))
    assert run.resume_command == again
    fewer = run.command_to_resume(hosts=2, output_dir=Path("a b"))
    *words, config = shlex.split(fewer)
    assert words == [*again.split(), "--param"]
    name, _, value = config.partition("=")
    assert name == "config"
    assert json.loads(value) == {"gpus": "1", "hosts": 2, "output_dir": "a b"}
    alone = "qwen3ft train --resume r1 --set hosts=1"
    assert run.command_to_resume(hosts=1) == alone
    assert run.command_to_resume(hosts="1") == alone


def test_an_address_that_is_no_url_is_no_server_of_the_project(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that has the command is shown all the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_API_URL", "http://[::1")
    assert run.resume_command == "qwen3ft train --resume r1"


@pytest.mark.parametrize("run_id", ["r2", "never-begun"])
def test_a_run_that_never_began_is_no_run(run: RunDir, run_id: str) -> None:
    """A folder without settings is none; the message names the newest runs."""
    (run.path.parent / "never-begun").mkdir()
    with pytest.raises(ConfigError, match=f"There is no run {run_id}") as refused:
        find_begun_run(run.path.parent, run_id)
    assert "r1" in refused.value.why
    with pytest.raises(ConfigError, match="There is no run"):
        settings_to_resume(TrainingConfig(runs_dir=str(run.path.parent)), run_id)


def test_damaged_settings_end_in_an_explanation(run: RunDir) -> None:
    """The defaults never stand in for them."""
    run.config.write_text('{"model_name": "emb')
    with pytest.raises(ConfigError, match="settings of run r1 cannot be read"):
        own_settings(run)


def test_a_moved_run_lies_where_it_was_found(run: RunDir, tmp_path: Path) -> None:
    """Its settings name the folder that it was moved from."""
    moved = tmp_path / "moved"
    run.path.parent.rename(moved)
    found = find_begun_run(moved, "r1")
    assert resumed_settings(found, {}).runs_dir == str(moved)


def test_a_night_finishes_an_earlier_one_with_that_runs_settings(run: RunDir) -> None:
    """What may change is tonight's."""
    tonight = own_settings(run).model_copy(update={"batch_size": 8, "keep_checkpoints": 9})
    finished = settings_to_finish(tonight, "r1")
    assert (finished.batch_size, finished.keep_checkpoints) == (4, 9)
    assert settings_to_finish(tonight, "none") == tonight


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"model_name": "embedded", "seed": 0}, {}),  # nothing was filled in
        ({"model_name": "embedded", "seed": 5, "output_dir": "x"}, {"seed": 5, "output_dir": "x"}),
        ({"seed": 0}, {"seed": 0}),  # not from the form: it lacks what the form has
        ({"runs_dir": "y"}, {"runs_dir": "y"}),
    ],
)
def test_what_fills_the_form_of_the_deployment_was_not_asked_for(
    given: dict[str, Any], asked: dict[str, Any]
) -> None:
    """Else no run with other settings could be resumed from the page in Prefect."""
    assert asked_for(given, {"model_name": "embedded", "seed": 0}) == asked
    assert asked_for(given, {}) == given


@pytest.mark.parametrize("filled", [{"model_name": "embedded", "max_memory_gb": 13.0}])
def test_a_typed_setting_that_the_deployment_has_too_is_asked_for(
    run: RunDir, filled: dict[str, Any]
) -> None:
    """The command asks for nothing that could be taken for the deployment's form."""
    own = own_settings(run).model_copy(update={"max_memory_gb": 20.0, "gpus": "2"})
    write_record(run.config, own)
    sent = resume_parameters(run, resumed_settings(run, {"max_memory_gb": 13.0}))
    assert sent["continue_run"] == "r1"
    assert asked_for(sent["config"], filled)["max_memory_gb"] == 13.0
    assert resumed_settings(run, asked_for(sent["config"], filled)).gpus == "2"


@pytest.mark.parametrize(
    ("usual", "begun", "change"),
    [
        ({"gpus": "2", "hosts": 2}, {"gpus": "4"}, {"gpus": "2"}),
        (
            {"judge_url": "https://usual/v1", "judge_model": "j"},
            {"judge_url": "https://old/v1", "judge_model": "j"},
            {"judge_url": "https://usual/v1"},
        ),
    ],
)
def test_a_request_of_the_command_is_no_form_of_a_deployment_with_few_settings(
    run: RunDir,
    tmp_path: Path,
    usual: dict[str, Any],
    begun: dict[str, Any],
    change: dict[str, Any],
) -> None:
    """Such as one of a qwen3ft.yaml with only the settings that are checked together."""
    (tmp_path / "qwen3ft.yaml").write_text(json.dumps(usual))
    filled = choose_defaults(tmp_path).config
    write_record(run.config, own_settings(run).model_copy(update=begun))
    sent = resume_parameters(run, resumed_settings(run, change))["config"]
    asked = asked_for(sent, filled)
    assert {name: asked.get(name) for name in change} == change
    assert asked_for(filled, filled) == {}


@pytest.mark.parametrize(
    ("begun", "change"),
    [
        ({"judge_url": "https://old/v1", "judge_model": "j"}, {"judge_url": "https://new/v1"}),
        ({"gpus": "auto"}, {"gpus": "0,1"}),
    ],
)
def test_settings_that_are_checked_together_are_sent_together(
    run: RunDir, begun: dict[str, Any], change: dict[str, Any]
) -> None:
    """Prefect validates them without the run's, and the flow over those of the deployment."""
    write_record(run.config, own_settings(run).model_copy(update=begun))
    sent = resume_parameters(run, resumed_settings(run, change))["config"]
    usual = {"hosts": 2, "gpus": "2"}
    wanted = parse_config(merge_settings(usual, TrainingConfig(**sent).model_dump(include={*sent})))
    assert {name: getattr(wanted, name) for name in change} == change
    assert resumed_settings(run, asked_for(sent, {})) == resumed_settings(run, change)
