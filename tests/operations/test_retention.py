"""Cleaning removes what is old and never what is in use, on real folders, locks and a registry."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from support.registered import copy_database

from qwen3ft.config import TrainingConfig
from qwen3ft.disk.locks import try_lock
from qwen3ft.errors import RequestError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.retention import (
    DAY_SECONDS,
    Removal,
    RetentionPolicy,
    plan_removals,
    remove,
)
from qwen3ft.operations.run_state import find_runs
from qwen3ft.registry.versions import ProtectedVersion, find_protected
from qwen3ft.tracking.journal import Journal

OLD_DAYS = 60.0
POLICY = RetentionPolicy(keep_runs=0)


class Project:
    """A project folder with runs in it."""

    def __init__(self, root: Path) -> None:
        self.config = TrainingConfig(
            model_name="embedded",
            runs_dir=str(root / "runs"),
            cache_dir=str(root / "cache"),
            output_dir=str(root / "out"),
        )
        self.root = root

    def shared(self, name: str, days: float = OLD_DAYS) -> Path:
        """A quantised model or tokenised rows."""
        folder = self.root / "cache" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        return _aged(folder, days)

    def run(
        self,
        name: str,
        *,
        days: float = OLD_DAYS,
        card: str | None = "embedded: kept",
        checkpoints: bool = True,
        base: Path | None = None,
    ) -> RunDir:
        """A run's folder, last written so many days ago."""
        run = RunDir(self.root / "runs" / name)
        job = run.attempt(1)
        job.path.mkdir(parents=True)
        run.log.write_text("{}\n")
        job.request.write_text(json.dumps({"model": {"path": str(base)}} if base else {}))
        if checkpoints:
            step = job.checkpoints / "step-000010"
            step.mkdir(parents=True)
            (step / "manifest.json").write_text("{}")
        if card:
            (run.path / "card.json").write_text(json.dumps({"title": card}))
        _aged(run.path, days)
        return run

    def plan(self, *protected: ProtectedVersion, policy: RetentionPolicy = POLICY) -> list[Removal]:
        """The planned removals."""
        return plan_removals(self.config, protected, policy)

    def names(self, *protected: ProtectedVersion, policy: RetentionPolicy = POLICY) -> set[str]:
        """Names of the folders to be removed."""
        return {Path(removal.path).name for removal in self.plan(*protected, policy=policy)}


def _aged(folder: Path, days: float) -> Path:
    then = time.time() - days * DAY_SECONDS
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def version(run_id: str | None, **changes: Any) -> ProtectedVersion:
    values: dict[str, Any] = {
        "registered_model": "qwen3ft-embedded",
        "version": "3",
        "aliases": ("champion",),
        "run_id": run_id,
    }
    return ProtectedVersion(**{**values, **changes})


def test_old_runs_go_and_young_ones_stay(project: Project) -> None:
    """Runs go by age, unless among the newest; planning alone changes nothing."""
    project.run("old")
    project.run("older", days=90)
    project.run("young", days=3, card=None, checkpoints=False)
    assert project.names() == {"old", "older"}
    assert project.names(policy=RetentionPolicy(keep_runs=2)) == {"older", "checkpoints"}
    assert len(find_runs(project.root / "runs")) == 3


def test_a_run_in_use_stays_whole(project: Project) -> None:
    """Champion, previous and challenger stay with their checkpoints, whatever their age."""
    for name in ("champion", "previous", "challenger", "other"):
        project.run(name, base=project.shared(f"models/{name}"))
    in_use = [
        version(name, version=str(number), aliases=(name,))
        for number, name in enumerate(("champion", "previous", "challenger"))
    ]
    assert project.plan(*in_use)
    assert project.names(*in_use) == {"other"}
    assert {removal.kind for removal in project.plan(*in_use)} == {"run", "quantised model"}


def test_a_run_that_can_be_continued_stays_until_it_is_abandoned(project: Project) -> None:
    """Runs with checkpoints, unsaved or deferred ones stay; one without anything goes."""
    project.run("failed", card=None)
    project.run("deferred", card="embedded: deferred")
    project.run("trained", card=None, checkpoints=False).attempt(1).outcome.write_text("{}")
    _aged(project.root / "runs" / "trained", OLD_DAYS)
    project.run("empty", card=None, checkpoints=False)
    assert project.names() == {"empty"}
    assert project.names(policy=RetentionPolicy(keep_runs=0, abandon=("failed",))) == {
        "empty",
        "failed",
    }


@pytest.mark.parametrize("wanted", ["done", "unknown"])
def test_only_a_run_that_could_be_continued_can_be_abandoned(project: Project, wanted: str) -> None:
    """A typing error is an error, and nothing is removed."""
    project.run("done", days=1)
    with pytest.raises(RequestError, match=f"Run {wanted} cannot be abandoned"):
        project.plan(policy=RetentionPolicy(abandon=(wanted,)))


def test_a_run_that_mlflow_lacks_stays(project: Project) -> None:
    """Its journal is the only copy of its measurements."""
    run = project.run("unsent")
    Journal(run).tags({"verdict": "kept"})
    _aged(run.path, OLD_DAYS)
    assert project.plan() == []


def test_a_running_run_stays_and_so_does_all_that_runs_share(project: Project) -> None:
    """It has just begun, and its folder does not show yet which model it will load."""
    project.shared("models/unused")
    running = project.run("running", card=None, checkpoints=False)
    project.run("old")
    assert project.names() == {"unused", "old", "running"}
    with try_lock(running.lock) as mine:
        assert mine
        assert project.names() == {"old"}


def test_a_run_that_begins_after_the_plan_was_made_is_not_removed(project: Project) -> None:
    """The lock is checked again at the moment of removal."""
    run = project.run("continued", card=None, checkpoints=False)
    plan = project.plan()
    assert len(plan) == 1
    with try_lock(run.lock):
        assert remove(plan) == []
    assert run.log.exists()
    assert remove(plan) == plan
    assert not run.path.exists()
    assert list((project.root / "runs").iterdir()) == []


def test_checkpoints_of_completed_runs_go_before_the_runs(project: Project) -> None:
    """They go after a week; the card, the metrics and the log stay."""
    run = project.run("done", days=8)
    project.run("recent", days=6)
    [removal] = project.plan()
    assert (removal.kind, removal.path) == ("checkpoints", str(run.attempt(1).checkpoints))
    remove([removal])
    assert (run.path / "card.json").exists()
    assert not list(run.attempt(1).path.glob("*checkpoints*"))


def test_a_base_stays_while_something_kept_needs_it(project: Project) -> None:
    """A base needed by a young run, one to continue, or a champion stays; others go."""
    bases = {name: project.shared(f"models/{name}") for name in ("young", "failed", "champion")}
    project.shared("models/unused")
    project.shared("datasets/unused rows")
    project.shared("models/new", days=1)
    project.run("young", days=3, base=bases["young"])
    project.run("failed", card=None, base=bases["failed"])
    copy = project.shared("champions/qwen3ft-embedded/3")
    card = {"base": {"snapshot_path": str(bases["champion"])}}
    (copy / "provenance.json").write_text(json.dumps(card))
    assert project.names(version("elsewhere")) == {"unused", "unused rows"}


def test_no_base_goes_while_that_of_the_champion_is_not_known(
    project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    """Its run is gone and there is no local copy, so any base may be the one."""
    project.shared("models/unused")
    with caplog.at_level("WARNING", logger="qwen3ft.retention"):
        assert project.plan(version(None)) == []
    assert "qwen3ft-embedded v3 (champion)" in caplog.text


def test_copies_of_former_champions_and_leftovers_of_killed_writes_go(project: Project) -> None:
    """The copy in use, saved adapters and writes begun today stay."""
    for number in ("2", "3"):
        copy = project.shared(f"champions/qwen3ft-embedded/{number}")
        card = {"base": {"snapshot_path": str(project.root / "gone")}}
        (copy / "provenance.json").write_text(json.dumps(card))
    project.shared("models/.killed.ab12cd_3")
    project.shared("models/.begun.ab12cd_4", days=0)
    for hidden in (".git", ".cache", ".venv", ".run.old.ab12cd_5"):  # not ours; the only copy
        folder = project.root / "out" / hidden
        folder.mkdir(parents=True)
        _aged(folder, OLD_DAYS)
    for hidden in ("saved", ".saved.old.ab12cd_6"):
        folder = project.root / "out" / hidden
        folder.mkdir()
        _aged(folder, OLD_DAYS)
    _aged(project.run("other").path.rename(project.root / "runs" / ".half.gone"), OLD_DAYS)
    (project.root / "runs" / ".nights").mkdir()
    _aged(project.root / "runs" / ".nights", OLD_DAYS)
    went = {"2", ".killed.ab12cd_3", ".half.gone", ".saved.old.ab12cd_6"}
    assert project.names(version(None)) == went


def test_files_of_an_export_or_server_that_was_killed_go(project: Project) -> None:
    """One whose worker gives signs of life keeps them, however long ago it was started."""
    project.shared("sessions/killed")
    (project.shared("sessions/answers") / "heartbeat").touch()
    _aged(project.root / "cache" / "sessions" / "answers" / "manifest.json", OLD_DAYS)
    project.shared("sessions/begun", days=0)
    project.shared("export/crashed")
    project.shared("export/running", days=0)
    assert project.names() == {"killed", "crashed"}


def test_what_has_any_alias_is_protected(migrated_database: Path, tmp_path: Path) -> None:
    """Read from a real registry, with the run that made each version."""
    from qwen3ft.tracking.connection import connect, load_client

    uri = copy_database(migrated_database, tmp_path)
    connect(uri)
    client = load_client()(uri)
    client.create_registered_model("m")
    for run in ("one", "two", "three"):
        client.create_model_version("m", f"runs:/{run}/adapter", tags={"run": run})
    client.set_registered_model_alias("m", "champion", "3")
    client.set_registered_model_alias("m", "pinned", "3")
    client.set_registered_model_alias("m", "previous", "1")
    found = {item.run_id: item.aliases for item in find_protected(uri)}
    assert found == {"three": ("champion", "pinned"), "one": ("previous",)}
