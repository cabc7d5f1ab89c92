"""Decisions of a start of the flow before any stage, without a Prefect server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.registered import copy_database

from flows.nightly import (
    claim_tonight,
    find_request,
    for_night,
    is_nightly,
    seen_before,
)
from flows.resume import refuse_second_resume
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import FinetuneError
from qwen3ft.operations.night import NightRequest, claim_night, nights_folder

REQUEST = NightRequest(sha256="a" * 64, settings_sha256="b" * 64, files=1)


def config(tmp_path: Path, **changes: str) -> TrainingConfig:
    folders = {"cache_dir": str(tmp_path / "cache"), "runs_dir": str(tmp_path / "runs")}
    return TrainingConfig.model_validate({"model_name": "embedded", **folders, **changes})


def test_a_crashed_run_is_taken_up_once_and_then_left_to_a_person() -> None:
    """The error names the command that continues it."""
    settings = TrainingConfig()
    refuse_second_resume(settings, None, 0)
    refuse_second_resume(settings, "r1", 1)
    with pytest.raises(FinetuneError, match="r1 crashed again") as caught:
        refuse_second_resume(settings, "r1", 2)
    assert caught.value.next_command == "qwen3ft run --resume r1"


def test_a_night_skips_what_is_unchanged_and_other_runs_keep_their_setting(tmp_path: Path) -> None:
    """Outside a flow run there is no schedule's tag."""
    asked = config(tmp_path)
    assert not is_nightly(asked=False)
    assert for_night(asked, nightly=False) == asked
    assert for_night(asked, nightly=True).when_unchanged == "skip"


def test_a_run_that_is_taken_up_after_midnight_does_the_night_that_it_crashed_in(
    tmp_path: Path,
) -> None:
    """Otherwise its night would stay unfinished and the next one count as done."""
    asked, date = config(tmp_path), "2026-11-20"
    with pytest.raises(ZeroDivisionError), claim_night(tmp_path / "runs", date, REQUEST, "r1"):
        raise ZeroDivisionError
    with claim_tonight(asked, REQUEST, True, "r1") as night:
        assert (night.run_id, night.again, night.taken) == ("r1", True, None)
        night.settle("kept")
    [record] = nights_folder(tmp_path / "runs").glob("*.json")
    assert record.name.startswith(date)


@pytest.mark.parametrize(
    ("outcome", "taken"),
    [
        *(("kept", True), ("promoted", True), ("nothing new", True)),
        *(("failed", False), ("deferred", False), ("cancelled", False)),
    ],
)
def test_a_run_that_has_its_verdict_is_not_resumed(
    tmp_path: Path, outcome: str, taken: bool
) -> None:
    """Neither by a person nor by the second of several runs that a busy server starts."""
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    (run / "config.json").touch()
    (run / "card.json").write_text(json.dumps({"outcome": outcome, "verdict": "so it ended"}))
    with claim_tonight(config(tmp_path), REQUEST, False, "r1") as night:
        assert night.taken == ("run r1 is already completed: so it ended" if taken else None)


def test_data_that_cannot_be_read_is_for_the_stages_to_report(tmp_path: Path) -> None:
    """The request is unknown, so the run proceeds as usual."""
    missing = TrainingConfig(
        model_name="embedded", data_paths=(str(tmp_path / "none"),), cache_dir=str(tmp_path)
    )
    assert find_request(missing) is None
    assert find_request(config(tmp_path)) is not None


def test_a_registry_that_cannot_be_asked_is_no_reason_not_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections are refused, so the run proceeds as usual."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert seen_before(config(tmp_path, when_unchanged="skip"), REQUEST) is None


def test_the_answer_comes_from_the_champions_tags_without_torch(
    migrated_database: Path, tmp_path: Path
) -> None:
    """With a real registry the same request is old, another one is not; no torch is loaded."""
    program = """
import sys
from pathlib import Path
import flows.finetune
print(sorted({"torch", "mlflow"} & set(sys.modules)))
from flows.nightly import seen_before
from qwen3ft.config import TrainingConfig
from qwen3ft.operations.night import NightRequest, claim_night
from qwen3ft.disk.locks import try_lock
from qwen3ft.tracking.connection import connect, load_client
uri, runs = sys.argv[1:]
connect(uri)
client = load_client()(uri)
config = TrainingConfig(model_name="embedded", when_unchanged="skip", runs_dir=runs)
def since(digest):
    return seen_before(config, NightRequest(sha256=digest, settings_sha256="", files=1))
print(since("a"))
client.create_registered_model("qwen3ft-embedded")
tags = {"request_sha256": "a", "adapter_sha256": "d", "run": "r"}
client.create_model_version("qwen3ft-embedded", "runs:/r/adapter", tags=tags)
client.set_registered_model_alias("qwen3ft-embedded", "champion", "1")
print(since("a"))
print(since("b"))
other = NightRequest(sha256="b", settings_sha256="", files=1)
with claim_night(Path(runs), "2026-11-26", other, "r2") as night:
    night.settle("kept", "1")
print(since("b"))
lock = Path(runs) / "r" / "run.lock"
lock.parent.mkdir()
with try_lock(lock):
    print(since("a"))
print("torch" in sys.modules)
"""
    uri = copy_database(migrated_database, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program, uri, str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        env={"MLFLOW_TRACKING_URI": uri, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.stdout.splitlines() == [
        "[]",  # nor does importing the whole flow load them
        "None",
        "qwen3ft-embedded v1",
        "None",
        "run r2, which was no better than qwen3ft-embedded v1",
        "None",  # the champion's own run, killed after its promotion, is at work on its end
        "False",
    ], done.stderr
