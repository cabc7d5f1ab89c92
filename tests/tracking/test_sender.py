"""What arrives in a real MLflow, also after crashes and refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
from datetime import timedelta
from pathlib import Path

import pytest
from support.killed import killed
from support.small_adapter import write_small_adapter
from support.tracked_run import (
    START,
    artifact_names,
    history,
    journal_run,
    make_plan,
    send_all,
    steps_of,
    write_steps,
)

from qwen3ft.jobs.folders import RunDir
from qwen3ft.tracking import sender
from qwen3ft.tracking.connection import connect
from qwen3ft.tracking.cursor import (
    TrackingState,
    outstanding,
    parent_run_id,
    read_state,
    state_path,
    write_state,
)
from qwen3ft.tracking.journal import Journal, journal_path
from qwen3ft.tracking.points import attempts_memory
from qwen3ft.tracking.run_metrics import CURVES
from qwen3ft.tracking.uri import artifact_address


def test_a_full_journal_is_found_in_mlflow(
    database: str, run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that was journaled can be read back from MLflow, and nothing is outstanding."""
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question": "q1", "base": "a"}\n{"question": "q2", "candidate": "b"}\n')
    journal = journal_run(run_dir)
    journal.table(answers)
    journal.json("report.json", {"exact_match": 0.5})
    journal.tags({"verdict": "promoted", "token": "hf_" + "x" * 20})
    write_small_adapter(tmp_path / "adapter")
    journal.artifacts(tmp_path / "adapter", "adapter")

    assert outstanding(run_dir) == 8 + 20 + 2 + 20 + 2
    send_all(run_dir, database)

    assert outstanding(run_dir) == 0
    parent = parent_run_id(run_dir)
    assert parent is not None
    client = connect(database).client
    run = client.get_run(parent)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"learning_rate": "5e-05"}
    assert run.data.tags["prefect.flow_run_id"] == "f-1"
    assert run.data.tags["verdict"] == "promoted"
    assert run.data.tags["token"] == "***"
    assert run.data.metrics["peak_memory_gb"] == 0.75
    dataset = run.inputs.dataset_inputs[0]
    assert dataset.dataset.digest == "d" * 36
    assert json.loads(dataset.dataset.profile)["digest"] == "d" * 64
    assert {tag.key: tag.value for tag in dataset.tags} == {"mlflow.data.context": "training"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)  # load_table asks the default MLflow
    table = client.load_table(run.info.experiment_id, "inference/answers.json")
    assert list(table["question"]) == ["q1", "q2"]
    assert artifact_names(database, parent, "figures") == {"figures/loss.png", "figures/memory.png"}
    assert "adapter/adapter_model.safetensors" in artifact_names(database, parent, "adapter")
    assert (tmp_path / "mlruns" / "artifacts" / parent / "artifacts" / "report.json").exists()


def test_an_attempt_is_a_child_run_with_its_plan_and_series(database: str, run_dir: RunDir) -> None:
    """The child run holds the flat plan, each step's metrics at its own time, and both figures."""
    journal_run(run_dir)
    send_all(run_dir, database)

    state = read_state(run_dir)
    child = connect(database).client.get_run(state.attempts[1].run_id)
    assert child.info.run_name == "attempt-1"
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == state.parent_run_id
    assert child.data.tags["best_step"] == "20"
    assert child.data.params["model.shape.hidden_size"] == "64"
    assert child.data.params["adapter.target_modules"] == "q_proj, v_proj"
    assert child.data.params["effective_batch_size"] == "64"
    assert child.data.params["predicted_gb.weights _4-bit_"] == "0.5"
    everything = set(child.data.metrics)
    assert everything == {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/tokens_per_second",
        "held_out/loss",
        "memory/allocated_gb",
        "memory/cached_gb",
        "memory/available_gb",
        "memory/process_gb",
    }
    run_id = child.info.run_id
    assert history(database, run_id, "train/loss") == [(s, 4.0 / s) for s in range(1, 21)]
    assert history(database, run_id, "held_out/loss") == [(10, 0.5), (20, 0.25)]
    for key in CURVES:
        curve = history(database, str(state.parent_run_id), key)
        assert curve == history(database, run_id, key) != []
    point = connect(database).client.get_metric_history(run_id, "train/loss")[0]
    assert point.timestamp == int((START + timedelta(seconds=1)).timestamp() * 1000)
    assert artifact_names(database, run_id, "figures") == {"figures/loss.png", "figures/memory.png"}
    assert artifact_names(database, run_id, "") >= {"plan.json"}


def test_memory_of_all_attempts_and_what_it_was_full_of_reach_mlflow(
    database: str, run_dir: RunDir
) -> None:
    """The run's picture is of both attempts; the failed one's report is with its child run."""
    journal = Journal(run_dir)
    journal.run_started("run-1", {}, {})
    for number, failure in ((1, "OutOfMemoryError"), (2, "")):
        journal.attempt_started(make_plan(run_dir, number))
        write_steps(run_dir.attempt(number), range(1, 4))
        if failure:
            report = run_dir.attempt(number).memory_report
            report.mkdir()
            (report / "resident.txt").write_text("Resident memory")
            journal.attempt_ended(number, "FAILED", {"failure": failure})
        else:
            journal.attempt_ended(number, "FINISHED")
    first, second = attempts_memory(run_dir)
    assert (first.failure, second.failure) == ("OutOfMemoryError", None)
    assert [len(attempt.samples) for attempt in (first, second)] == [3, 3]
    assert first.predicted == make_plan(run_dir).predicted
    assert first.budget_gb == 2.0

    send_all(run_dir, database)
    state = read_state(run_dir)
    children = [state.attempts[number].run_id for number in (1, 2)]
    assert artifact_names(database, children[0], "memory") == {"memory/resident.txt"}
    assert artifact_names(database, children[1], "memory") == set()
    artifacts = Path(database.removeprefix("sqlite:///")).parent / "artifacts"
    pictures = {
        (artifacts / str(run_id) / "artifacts" / "figures" / "memory.png").read_bytes()
        for run_id in (*children, state.parent_run_id)
    }
    assert len(pictures) == 3


def test_a_killed_process_loses_nothing_and_doubles_nothing(
    database: str, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After SIGKILL in the middle of sending, the next sender completes the same two runs."""
    journal_run(run_dir, steps=450)

    def write_and_die(run: RunDir, state: TrackingState) -> None:
        write_state(run, state)
        if any(cursor.metrics_offset for cursor in state.attempts.values()):
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(sender, "write_state", write_and_die)
        killed(lambda: send_all(run_dir, database))
    assert 450 < outstanding(run_dir) < 2 * 450, "one of three batches of metrics was sent"

    send_all(run_dir, database)

    assert steps_of(database, run_dir) == list(range(1, 451))
    experiment = connect(database).experiment_id
    assert len(connect(database).client.search_runs([experiment])) == 2


def test_a_lost_cursor_makes_no_second_run(database: str, run_dir: RunDir) -> None:
    """Without its cursor a run is found again by its identity, and points are not doubled."""
    journal_run(run_dir)
    send_all(run_dir, database)
    state_path(run_dir).unlink()
    send_all(run_dir, database)
    experiment = connect(database).experiment_id
    assert len(connect(database).client.search_runs([experiment])) == 2
    assert steps_of(database, run_dir) == list(range(1, 21))


def test_a_run_that_mlflow_forgot_is_sent_again_in_full(
    database: str, run_dir: RunDir, migrated_database: Path, tmp_path: Path
) -> None:
    """Pointed at another MLflow, the journal fills it completely; addresses name the run there."""
    journal = journal_run(run_dir)
    address = artifact_address("figures/a picture.png")
    journal.tags({"late": "yes", "address": address})
    send_all(run_dir, database)
    first = connect(database).client.get_run(parent_run_id(run_dir))
    (tmp_path / "other").mkdir()
    other = f"sqlite:///{shutil.copy(migrated_database, tmp_path / 'other' / 'mlflow.db')}"
    send_all(run_dir, other)
    assert steps_of(other, run_dir) == list(range(1, 21))
    again = connect(other).client.get_run(parent_run_id(run_dir))
    assert again.data.tags["late"] == "yes"
    page = "get-artifact?path=figures%2Fa%20picture.png&run_uuid="
    for found in (first, again):
        assert found.data.tags["address"] == f"{page}{found.info.run_id}"


def test_what_mlflow_refuses_is_skipped_and_the_rest_arrives(
    database: str, run_dir: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed parameter, a missing file and a torn line are logged; what follows is sent."""
    journal = Journal(run_dir)
    journal.run_started("run-1", {"a": 1}, {})
    journal.run_started("run-1", {"a": 2}, {})
    journal.artifacts(tmp_path / "gone", "adapter")
    with journal_path(run_dir).open("ab") as stream:
        stream.write(b'{"kind": "metrics", "val')
    journal.metrics({"after": float("nan")})
    journal.tags({"last": "sent"})
    send_all(run_dir, database)
    run = connect(database).client.get_run(parent_run_id(run_dir))
    assert run.data.params == {"a": "1"}
    assert run.data.metrics["after"] != run.data.metrics["after"]
    assert run.data.tags["last"] == "sent"
    assert caplog.text.count("skipped") == 3
