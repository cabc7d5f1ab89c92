"""Tracking against a real MLflow: SQLite files, one real server, and real outages between them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from qwen3ft.config import registered_model_name
from qwen3ft.errors import ChampionChangedError, ConfigError, SaveError, TrackingUnavailableError
from qwen3ft.files import append_json_line, sha256_file
from qwen3ft.jobs.folders import JobDir, RunDir
from qwen3ft.records.data import DatasetManifest, DataSource, LengthSummary
from qwen3ft.records.model import AdapterSpec, ModelShape, ModelSnapshot, ModelSource, SavedAdapter
from qwen3ft.records.plan import MemoryPart, MemorySettings, TrainPlan
from qwen3ft.records.training import MemoryStatus, TrainingMetrics
from qwen3ft.registry.registry import Registry
from qwen3ft.tracking.connection import EXPERIMENT_NAME, _make_experiment, connect
from qwen3ft.tracking.cursor import outstanding, parent_run_id, read_state, state_path
from qwen3ft.tracking.journal import Journal, journal_path
from qwen3ft.tracking.mirror import Mirror, replay, replay_unsent
from qwen3ft.tracking.points import attempts_memory
from qwen3ft.tracking.uri import database_path, default_tracking_uri, is_answering, run_url

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MODEL = "Qwen/Qwen3-4B-Thinking-2507"


# --- real MLflow databases, and a real server ---


@pytest.fixture
def database(migrated_database: Path, tmp_path: Path) -> str:
    (tmp_path / "mlruns").mkdir()
    path = shutil.copy(migrated_database, tmp_path / "mlruns" / "mlflow.db")
    return f"sqlite:///{path}"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "run-1")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running `mlflow server`; gives its folder, which holds mlflow.db, artifacts and `port`."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    database = shutil.copy(migrated_database, folder / "mlflow.db")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{database}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        wait_until(lambda: is_healthy(port), seconds=200)
        (folder / "port").write_text(str(port))
        yield folder
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.05)


class Proxy:
    """Stands before a server and passes, refuses, cuts, fails or swallows every request."""

    def __init__(self, target_port: int = 0) -> None:
        self.mode = "pass" if target_port else "hang"
        self.target_port = target_port
        self._held: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening and drop what is held."""
        self._socket.close()
        for connection in self._held:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._held.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
            if self.mode == "hang":
                return
            if self.mode == "cut":
                connection.close()
                return
            if self.mode == "500":
                connection.sendall(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
                connection.close()
                return
            upstream = socket.create_connection(("127.0.0.1", self.target_port))
            upstream.sendall(data)
            threading.Thread(target=self._pump, args=(connection, upstream), daemon=True).start()
            self._pump(upstream, connection)
        except OSError:
            connection.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self.mode != "pass":
                    break
                sink.sendall(data)
        except OSError:
            pass
        if self.mode != "hang":
            source.close()
            sink.close()


@pytest.fixture
def hanging_server() -> Iterator[str]:
    proxy = Proxy()
    yield proxy.uri
    proxy.close()


# --- what a flow and its worker write ---


def make_manifest() -> DatasetManifest:
    lengths = LengthSummary(
        rows=8, tokens=400, trained_tokens=200, longest_tokens=60, median_tokens=50, p95_tokens=58
    )
    return DatasetManifest(
        path="cache/data/abc",
        digest="d" * 64,
        sources=(DataSource(path="qa.jsonl", sha256="e" * 64, rows=12, role="train"),),
        rows_read=12,
        train=lengths,
        dev=lengths.model_copy(update={"rows": 2}),
        test_rows=2,
        quarantined=0,
        too_long=0,
        duplicates=0,
        quarantine_path=None,
    )


def make_plan(run_dir: RunDir, attempt: int = 1) -> TrainPlan:
    shape = ModelShape(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    model = ModelSnapshot(
        source=ModelSource(model_name=MODEL, revision="a" * 40, local_path=None),
        path="cache/models/x",
        manifest_sha256="b" * 64,
        quantization="nf4-double",
        compute_dtype="float32",
        shape=shape,
        size_bytes=1000,
        chat_template_sha256="c" * 64,
    )
    return TrainPlan(
        attempt=attempt,
        run_id=run_dir.path.name,
        run_dir=str(run_dir.path),
        model=model,
        adapter=AdapterSpec(
            r=6,
            alpha=12,
            dropout=0.0,
            target_modules=("q_proj", "v_proj"),
            trainable_parameters=1000,
            total_parameters=100000,
        ),
        dataset=make_manifest(),
        device="cpu",
        max_memory_gb=2.0,
        memory=MemorySettings(
            micro_batch_size=4,
            eval_batch_size=4,
            gradient_checkpointing=False,
            loss_chunk_tokens=512,
        ),
        effective_batch_size=64,
        max_sequence_length=256,
        learning_rate=5e-5,
        lr_scheduler="linear",
        warmup_steps=1,
        total_steps=100,
        num_epochs=1,
        weight_decay=0.0,
        max_grad_norm=1.0,
        evaluate_every_steps=10,
        early_stopping_patience=3,
        keep_checkpoints=2,
        seed=0,
        stall_seconds=900.0,
        predicted=(MemoryPart(name="weights (4-bit)", bytes=2**29, formula="n / 2"),),
        reasons={"micro_batch_size": "fits"},
        resume_from=None,
    )


def write_steps(job: JobDir, steps: range) -> None:
    """What a worker appends: one line of metrics and one of memory per optimizer step."""
    job.path.mkdir(parents=True, exist_ok=True)
    for step in steps:
        status = MemoryStatus(
            allocated_gb=0.5, cached_gb=0.75, total_gb=2.0, available_gb=1.25, is_safe=True
        )
        moment = START + timedelta(seconds=step)
        line = TrainingMetrics(
            epoch=step / 10,
            step=step,
            loss=4.0 / step,
            learning_rate=5e-5,
            memory_usage=status,
            timestamp=moment,
            grad_norm=1.0,
            tokens_per_second=100.0,
            held_out_loss=None,
        )
        append_json_line(job.metrics, line.model_dump(mode="json"))
        sample = {**status.model_dump(), "step": step, "timestamp": moment.isoformat()}
        append_json_line(job.memory, sample)
        if step % 10 == 0:
            evaluation = line.model_copy(update={"loss": None, "held_out_loss": 5.0 / step})
            append_json_line(job.metrics, evaluation.model_dump(mode="json"))


def write_adapter(folder: Path, content: bytes = b"weights") -> SavedAdapter:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "adapter_config.json").write_text("{}")
    return SavedAdapter(
        path=str(folder),
        sha256=sha256_file(folder / "adapter_model.safetensors"),
        size_bytes=len(content),
        model_name=MODEL,
        mlflow_run_id=None,
        registered_model=None,
        version=None,
    )


def journal_run(run_dir: RunDir, steps: int = 20) -> Journal:
    """A whole run with one attempt, as a flow journals it."""
    journal = Journal(run_dir)
    journal.run_started("run-1", {"learning_rate": 5e-5}, {"prefect.flow_run_id": "f-1"})
    journal.dataset(make_manifest())
    journal.attempt_started(make_plan(run_dir))
    write_steps(run_dir.attempt(1), range(1, steps + 1))
    journal.attempt_ended(1, "FINISHED", {"best_step": steps})
    journal.metrics({"peak_memory_gb": 0.75}, step=steps)
    journal.run_finished("FINISHED")
    return journal


def journal_adapter(run_dir: RunDir, content: bytes = b"weights") -> SavedAdapter:
    journal = Journal(run_dir)
    journal.run_started(run_dir.path.name, {}, {})
    saved = write_adapter(run_dir.path / "adapter", content)
    journal.artifacts(Path(saved.path), "adapter")
    return saved


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    points = connect(uri).client.get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def steps_of(uri: str, run_dir: RunDir, attempt: int = 1) -> list[int]:
    run_id = read_state(run_dir).attempts[attempt].run_id
    return [step for step, _ in history(uri, run_id, "train/loss")]


def artifact_names(uri: str, run_id: str, folder: str) -> set[str]:
    return {item.path for item in connect(uri).client.list_artifacts(run_id, folder)}


# --- what arrives ---


def test_one_who_makes_the_experiment_too_late_gets_it(database: str) -> None:
    """A first run's registry and mirror both see none, and both make it."""
    connection = connect(database)
    again = _make_experiment(connection.client, database_path(database))
    assert again == connection.experiment_id


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
    write_adapter(tmp_path / "adapter")
    journal.artifacts(tmp_path / "adapter", "adapter")

    assert outstanding(run_dir) == 8 + 20 + 2 + 20 + 2
    assert replay(run_dir, database)

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
    assert replay(run_dir, database)

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

    assert replay(run_dir, database)
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


def test_a_live_mirror_follows_the_worker_and_samples_the_system(
    database: str, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics of a running attempt arrive before it ends, and MLflow's system metrics with them."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    mirror = Mirror(run_dir, database).start()
    journal = Journal(run_dir)
    journal.run_started("run-1", {}, {})
    journal.attempt_started(make_plan(run_dir))
    write_steps(run_dir.attempt(1), range(1, 6))
    assert mirror.flush(60)
    wait_until(lambda: steps_of(database, run_dir) == [1, 2, 3, 4, 5], seconds=60)
    client, parent = connect(database).client, parent_run_id(run_dir)
    wait_until(
        lambda: "system/cpu_utilization_percentage" in client.get_run(parent).data.metrics, 10
    )
    write_steps(run_dir.attempt(1), range(6, 9))
    journal.attempt_ended(1, "FAILED", {"failure": "OutOfMemoryError"})
    journal.run_finished("FAILED")
    assert mirror.close(60)
    assert steps_of(database, run_dir) == list(range(1, 9))
    assert client.get_run(parent).info.status == "FAILED"


# --- outages ---


def test_nothing_is_lost_when_mlflow_is_down_for_the_whole_run(
    database: str, run_dir: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused connection is reported once and delays nobody; a later replay sends all points."""
    mirror = Mirror(run_dir, f"http://127.0.0.1:{free_port()}").start()
    journal_run(run_dir, steps=700)
    wait_until(lambda: "unreachable" in caplog.text, seconds=60)
    assert not mirror.close(2)
    assert outstanding(run_dir) == 6 + 700 + 70 + 700
    assert caplog.text.count("is unreachable; everything is kept in") == 1

    assert replay_unsent(run_dir.path.parent, database) == 0

    assert steps_of(database, run_dir) == list(range(1, 701))


def test_the_end_of_a_run_does_not_wait_for_what_has_long_been_gone(
    run_dir: RunDir, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute is for a server that is being restarted, not for one that is down all night."""
    mirror = Mirror(run_dir, f"http://127.0.0.1:{free_port()}").start()
    journal_run(run_dir, steps=1)
    wait_until(lambda: "unreachable" in caplog.text, seconds=60)
    monkeypatch.setattr("qwen3ft.tracking.mirror._HOPE_SECONDS", 0.0)
    started = time.monotonic()
    assert not mirror.close(60)
    assert time.monotonic() - started < 10


def test_whether_mlflow_answers(server: Path, database: str, hanging_server: str) -> None:
    """Anything said is an answer; a refused connection and silence are none."""
    port = (server / "port").read_text()
    assert is_answering(f"http://127.0.0.1:{port}")
    assert is_answering(f"http://127.0.0.1:{port}/nothing/here")
    assert is_answering(database)
    assert not is_answering(f"http://127.0.0.1:{free_port()}")
    assert not is_answering(hanging_server, timeout_seconds=0.3)


def test_a_hanging_mlflow_neither_delays_the_flow_nor_its_exit(
    hanging_server: str, run_dir: RunDir
) -> None:
    """Against a server that never answers, appending stays fast and the process can end."""
    script = f"""
import time
from pathlib import Path
from qwen3ft.attempt import RunDir
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.mirror import Mirror
run_dir = RunDir(Path({str(run_dir.path)!r}))
mirror = Mirror(run_dir, {hanging_server!r}).start()
journal = Journal(run_dir)
journal.run_started("run-1", {{}}, {{}})
import mlflow
time.sleep(0.5)
durations = []
for step in range(500):
    start = time.perf_counter()
    journal.metrics({{"loss": 1.0}}, step)
    durations.append(time.perf_counter() - start)
start = time.perf_counter()
closed = mirror.close(2)
print(sorted(durations)[250], closed, time.perf_counter() - start, time.time())
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=True
    )
    ended = time.time()
    median_seconds, closed, close_seconds, finished = result.stdout.split()
    assert float(median_seconds) < 0.001
    assert closed == "False"
    assert 1.9 < float(close_seconds) < 3
    assert ended - float(finished) < 5
    assert outstanding(run_dir) == 501


@pytest.mark.parametrize("fault", ["cut", "500", "hang"])
def test_a_run_survives_an_outage_in_its_middle(
    server: Path, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Whatever a server does for a while, the same mirror sends everything once it is back."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy = Proxy(int((server / "port").read_text()))
    mirror = Mirror(run_dir, proxy.uri).start()
    journal = Journal(run_dir)
    journal.run_started(f"run-{fault}", {}, {})
    journal.attempt_started(make_plan(run_dir))
    write_steps(run_dir.attempt(1), range(1, 11))
    assert mirror.flush(60)
    proxy.mode = fault
    write_steps(run_dir.attempt(1), range(11, 31))
    journal.metrics({"peak_memory_gb": 1.0})
    assert not mirror.flush(1.5)
    proxy.mode = "pass"
    journal.attempt_ended(1, "FINISHED")
    journal.run_finished("FINISHED")
    assert mirror.close(60)
    direct = f"http://127.0.0.1:{proxy.target_port}"
    assert steps_of(direct, run_dir) == list(range(1, 31))
    proxy.close()


def test_a_run_sent_through_a_server_goes_on_without_it(server: Path, run_dir: RunDir) -> None:
    """A database filled by a server takes artifacts directly, in the place the server uses."""
    port = (server / "port").read_text()
    uri = f"http://127.0.0.1:{port}"
    journal = journal_run(run_dir)
    assert replay(run_dir, uri)
    state = read_state(run_dir)
    assert run_url(uri, state) == (
        f"{uri}/#/experiments/{state.experiment_id}/runs/{state.parent_run_id}"
        "?workflowType=machine_learning"
    )

    database = f"sqlite:///{server / 'mlflow.db'}"
    assert run_url(database, state) is None
    journal.text("late.txt", "written without the server")
    assert replay(run_dir, database)
    assert "late.txt" in artifact_names(uri, str(state.parent_run_id), "")


# --- crashes ---


def test_a_killed_process_loses_nothing_and_doubles_nothing(database: str, run_dir: RunDir) -> None:
    """After SIGKILL in the middle of sending, a replay completes one parent and one child run."""
    journal_run(run_dir, steps=1500)
    script = f"""
from pathlib import Path
from qwen3ft.attempt import RunDir
from qwen3ft.tracking.mirror import replay
replay(RunDir(Path({str(run_dir.path)!r})), {database!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    wait_until(
        lambda: any(c.metrics_offset for c in read_state(run_dir).attempts.values()), seconds=120
    )
    process.kill()
    process.wait()
    assert outstanding(run_dir) > 0, "the kill came too late to prove anything"

    assert replay(run_dir, database)

    assert steps_of(database, run_dir) == list(range(1, 1501))
    experiment = connect(database).experiment_id
    assert len(connect(database).client.search_runs([experiment])) == 2


def test_a_lost_cursor_makes_no_second_run(database: str, run_dir: RunDir) -> None:
    """Without its cursor a run is found again by its identity, and points are not doubled."""
    journal_run(run_dir)
    assert replay(run_dir, database)
    state_path(run_dir).unlink()
    assert replay(run_dir, database)
    experiment = connect(database).experiment_id
    assert len(connect(database).client.search_runs([experiment])) == 2
    assert steps_of(database, run_dir) == list(range(1, 21))


def test_a_run_that_mlflow_forgot_is_sent_again_in_full(
    database: str, run_dir: RunDir, migrated_database: Path, tmp_path: Path
) -> None:
    """Pointed at another MLflow, the journal fills it completely."""
    journal = journal_run(run_dir)
    assert replay(run_dir, database)
    journal.tags({"late": "yes"})
    (tmp_path / "other").mkdir()
    other = f"sqlite:///{shutil.copy(migrated_database, tmp_path / 'other' / 'mlflow.db')}"
    assert replay(run_dir, other)
    assert steps_of(other, run_dir) == list(range(1, 21))
    assert connect(other).client.get_run(parent_run_id(run_dir)).data.tags["late"] == "yes"


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
    assert replay(run_dir, database)
    run = connect(database).client.get_run(parent_run_id(run_dir))
    assert run.data.params == {"a": "1"}
    assert run.data.metrics["after"] != run.data.metrics["after"]
    assert run.data.tags["last"] == "sent"
    assert caplog.text.count("skipped") == 3


def test_a_locked_database_delays_but_loses_nothing(
    database: str, run_dir: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    """While another process holds the database, appending goes on; then everything arrives."""
    import sqlite3

    journal_run(run_dir)
    holder = sqlite3.connect(database.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    mirror = Mirror(run_dir, database).start()
    assert not mirror.flush(1)
    holder.execute("ROLLBACK")
    holder.close()
    assert mirror.close(60)
    assert steps_of(database, run_dir) == list(range(1, 21))


def test_only_one_process_sends_a_run(database: str, run_dir: RunDir) -> None:
    """While a mirror is at work, nobody else replays its run or takes it for abandoned."""
    mirror = Mirror(run_dir, f"http://127.0.0.1:{free_port()}").start()
    wait_until(lambda: (run_dir.path / "tracking.lock").exists(), seconds=5)
    time.sleep(0.1)
    Journal(run_dir).run_started("run-1", {}, {})
    assert not replay(run_dir, database)
    assert replay_unsent(run_dir.path.parent, database) == 1
    mirror.close(1)


def test_a_run_whose_process_died_is_closed(database: str, run_dir: RunDir) -> None:
    """The next run's catch-up ends an abandoned run and its attempt as KILLED."""
    journal = Journal(run_dir)
    journal.run_started("run-1", {}, {})
    journal.attempt_started(make_plan(run_dir))
    write_steps(run_dir.attempt(1), range(1, 4))
    assert replay_unsent(run_dir.path.parent, database) == 0
    client, state = connect(database).client, read_state(run_dir)
    assert client.get_run(state.parent_run_id).info.status == "KILLED"
    assert client.get_run(state.attempts[1].run_id).info.status == "KILLED"
    assert steps_of(database, run_dir) == [1, 2, 3]


# --- the registry ---


@pytest.fixture
def registered(database: str, run_dir: RunDir) -> tuple[Registry, SavedAdapter, str]:
    """A registry with one version of one adapter."""
    saved = journal_adapter(run_dir)
    assert replay(run_dir, database)
    registry = Registry(database)
    return registry, saved, registry.register(str(parent_run_id(run_dir)), saved, {"loss": "1.2"})


def test_a_registered_adapter_can_be_promoted_and_fetched(
    registered: tuple[Registry, SavedAdapter, str], tmp_path: Path
) -> None:
    """What is downloaded from the champion is, byte for byte, what was saved."""
    registry, _, version = registered
    name = registered_model_name(MODEL)
    assert registry.champion(name) is None
    registry.promote(name, version, expected=None)
    champion = registry.champion(name)
    assert champion is not None
    assert (champion.version, champion.tags["loss"]) == (version, "1.2")
    path = registry.download(champion, tmp_path / "fetched")
    assert (path / "adapter_model.safetensors").read_bytes() == b"weights"
    assert registry.download(champion, path) == path


def test_registering_twice_gives_one_version(
    registered: tuple[Registry, SavedAdapter, str], run_dir: RunDir
) -> None:
    """A repeated registration after a crash finds the version made before it."""
    registry, saved, version = registered
    assert registry.register(str(parent_run_id(run_dir)), saved, {}) == version


def test_an_adapter_changed_in_mlflow_is_neither_registered_nor_fetched(
    registered: tuple[Registry, SavedAdapter, str], run_dir: RunDir, tmp_path: Path
) -> None:
    """One flipped byte among the artifacts is found before a version is made or handed out."""
    registry, saved, version = registered
    name, run_id = registered_model_name(MODEL), str(parent_run_id(run_dir))
    registry.promote(name, version, expected=None)
    champion = registry.champion(name)
    assert champion is not None
    stored = tmp_path / "mlruns" / "artifacts" / run_id / "artifacts" / "adapter"
    (stored / "adapter_model.safetensors").write_bytes(b"weightz")
    with pytest.raises(SaveError, match="has sha256"):
        registry.register(run_id, saved.model_copy(update={"registered_model": "other"}), {})
    assert registry.champion("other") is None
    with pytest.raises(SaveError, match="has sha256"):
        registry.download(champion, tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_an_adapter_that_never_arrived_is_not_registered(database: str, run_dir: RunDir) -> None:
    """Without the artifact in MLflow there is no version, however good the local file is."""
    saved = write_adapter(run_dir.path / "adapter")
    Journal(run_dir).run_started("run-1", {}, {})
    assert replay(run_dir, database)
    with pytest.raises(TrackingUnavailableError, match="holds no adapter"):
        Registry(database).register(str(parent_run_id(run_dir)), saved, {})


def test_promotion_compares_before_it_sets(
    registered: tuple[Registry, SavedAdapter, str], database: str, tmp_path: Path
) -> None:
    """A promotion that rests on an outdated champion is refused; the old one stays reachable."""
    registry, _, first = registered
    name = registered_model_name(MODEL)
    other = RunDir(tmp_path / "runs" / "run-2")
    saved = journal_adapter(other, b"other weights")
    assert replay(other, database)
    second = registry.register(str(parent_run_id(other)), saved, {})
    registry.promote(name, first, expected=None)
    with pytest.raises(ChampionChangedError, match=f"champion is {first}, not None"):
        registry.promote(name, second, expected=None)
    registry.promote(name, second, expected=first)
    registry.promote(name, second, expected=first)
    aliases = connect(database).client.get_registered_model(name).aliases
    assert {key: str(value) for key, value in aliases.items()} == {
        "champion": second,
        "previous": first,
    }


def test_of_many_promoters_at_once_exactly_one_wins(
    registered: tuple[Registry, SavedAdapter, str], database: str, run_dir: RunDir
) -> None:
    """Eight threads that saw no champion promote eight versions: one succeeds, seven are told."""
    assert registered[0].champion(registered_model_name(MODEL)) is None
    client, name = connect(database).client, registered_model_name(MODEL)
    run_id = str(parent_run_id(run_dir))
    versions = [
        str(client.create_model_version(name, f"runs:/{run_id}/adapter", run_id=run_id).version)
        for _ in range(8)
    ]
    outcomes: list[Any] = []

    def promote(version: str) -> None:
        try:
            Registry(database).promote(name, version, expected=None)
            outcomes.append(version)
        except ChampionChangedError:
            outcomes.append(None)

    threads = [threading.Thread(target=promote, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if outcome is not None]
    champion = Registry(database).champion(name)
    assert champion is not None
    assert winners == [champion.version]
    assert len(outcomes) == 8


def test_an_unreachable_registry_says_so_in_time(hanging_server: str) -> None:
    """Against a server that never answers, the registry gives up at its deadline."""
    for uri in (hanging_server, f"http://127.0.0.1:{free_port()}"):
        start = time.monotonic()
        with pytest.raises(TrackingUnavailableError):
            Registry(uri, deadline_seconds=1).champion("model")
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("name", ["a/b", "a:b", "a'b", ""])
def test_a_name_that_the_registry_cannot_hold_is_refused(database: str, name: str) -> None:
    """Forbidden characters are refused before MLflow is asked."""
    with pytest.raises(ConfigError):
        Registry(database).champion(name)


@pytest.mark.parametrize(
    ("model_name", "expected"),
    [
        (MODEL, "qwen3ft-Qwen--Qwen3-4B-Thinking-2507"),
        ("embedded", "qwen3ft-embedded"),
        ("/models/local/qwen", "qwen3ft-local--qwen"),
        ("./qwen", "qwen3ft-qwen"),
    ],
)
def test_every_model_has_a_valid_registry_name(model_name: str, expected: str) -> None:
    """Hub names, folders and the embedded model all give names without '/' and ':'."""
    assert registered_model_name(model_name) == expected


def test_the_default_is_a_database_of_the_working_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MLFLOW_TRACKING_URI wins; otherwise runs are kept in mlruns/mlflow.db."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert default_tracking_uri() == "http://127.0.0.1:5000"


def test_a_new_database_keeps_its_artifacts_beside_it(database: str, tmp_path: Path) -> None:
    """The experiment's artifacts have an absolute location next to the database."""
    connection = connect(database)
    experiment = connection.client.get_experiment_by_name(EXPERIMENT_NAME)
    assert experiment.artifact_location == (tmp_path / "mlruns" / "artifacts").as_uri()
