"""The resume campaign draws what it says, ends on time, and shows why a case failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from random import Random

import pytest

from benchmarks.jobs import python_path
from benchmarks.resume import checkout
from benchmarks.resume.__main__ import Campaign
from benchmarks.resume.cases import Case, changed_by, draw_settings, stage_of
from benchmarks.resume.project import EVIDENCE_LINES, Clock, Project, TimeIsUpError
from qwen3ft.config import TrainingConfig, parse_config
from qwen3ft.jobs.folders import RunDir

RUN = "0a0b0c0d-0000-4000-8000-000000000000"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "lane", 29000, Clock(60))


def test_settings_are_valid_and_not_the_defaults() -> None:
    default = TrainingConfig().model_dump(mode="json")
    for seed in range(20):
        drawn = draw_settings(Random(seed))
        values = parse_config(drawn).model_dump(mode="json")
        other = {name for name in drawn if values[name] != default[name]}
        assert other >= {"seed", "learning_rate", "max_steps", "data_paths", "columns"}
        assert len(other) >= 20
        assert draw_settings(Random(seed)) == drawn


def test_the_printed_command_is_taken_as_printed(project: Project) -> None:
    run = RunDir(project.root / "other runs" / RUN)
    run.path.mkdir(parents=True)
    shown = f"Next:  qwen3ft run --resume {RUN} --set 'output_dir=/a b'\nmore"
    assert project.printed_command(run, shown) == [
        *("run", "--resume", RUN, "--set", "output_dir=/a b")
    ]
    silent = project.printed_command(run, "Killed")  # as a card would have it
    assert silent == ["run", "--resume", RUN, "--set", f"runs_dir={run.path.parent}"]


def test_a_command_in_progress_ends_with_the_campaign(project: Project) -> None:
    began = time.monotonic()
    project._clock.end()
    with pytest.raises(TimeIsUpError):
        project._python("-c", "import time; time.sleep(60)")
    assert time.monotonic() - began < 20


def test_evidence_is_the_end_of_each_log(project: Project) -> None:
    run = RunDir(project.root / "runs" / RUN)
    run.path.mkdir(parents=True)
    run.log.write_text("".join(f"line {number}\n" for number in range(500)))
    project._python("-c", "print('before')")
    project._python("-c", "print('seen')")
    evidence = project.evidence(run, since=1)
    assert evidence[f"runs/{RUN}/run.jsonl"][-1] == "line 499"
    assert len(evidence[f"runs/{RUN}/run.jsonl"]) == EVIDENCE_LINES
    assert evidence["commands/0001.log"][-1] == "seen"
    assert "commands/0000.log" not in evidence


def test_a_failed_case_has_its_settings_and_logs_in_the_results() -> None:
    campaign = Campaign(runs=2, seed=0)
    campaign.add(Case(1, "f", {"seed": 3}, problems=["differs"], evidence={"a.log": ["end"]}))
    campaign.add(Case(0, "f", {"seed": 3}, stage="train", outcome="kept"))
    good, bad = json.loads(json.dumps(campaign.describe()))["cases"]
    assert "settings" not in good
    assert (bad["settings"], bad["evidence"]) == ({"seed": 3}, {"a.log": ["end"]})
    assert campaign.good == 1


def test_a_run_is_at_the_stage_that_its_files_show(tmp_path: Path) -> None:
    run = RunDir(tmp_path / RUN)
    (run.path / "jobs" / "data").mkdir(parents=True)
    assert stage_of(run) == "data"
    (run.path / "attempts" / "01").mkdir(parents=True)
    assert stage_of(run) == "train"
    (run.path / "card.json").write_text(json.dumps({"outcome": "failed", "verdict": ""}))
    assert stage_of(run) == "train"
    (run.path / "card.json").write_text(json.dumps({"outcome": "kept", "verdict": ""}))
    assert stage_of(run) == "none"


def test_a_checkout_that_is_not_installed_gets_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkout.register_checkout(tmp_path / "site") == []

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    [path] = checkout.register_checkout(tmp_path / "site")
    found = "import importlib.metadata as m; print(m.distribution('qwen3ft').locate_file(''))"
    done = subprocess.run(
        [sys.executable, "-c", found],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([path, python_path()])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == path


def test_what_a_printed_command_changes_is_expected() -> None:
    command = ["run", "--resume", RUN, "--set", "output_dir=/a b", "--set", "runs_dir=/r"]
    assert changed_by(command) == {"output_dir": "/a b", "runs_dir": "/r"}
