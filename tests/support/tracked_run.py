"""A run as a flow and its worker write it down, and what MLflow has of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from support.plans import TINY, manifest, plan_for
from support.small_adapter import write_small_adapter

from qwen3ft.disk.files import append_json_line
from qwen3ft.jobs.folders import JobDir, RunDir
from qwen3ft.records.data import DatasetManifest, DataSource
from qwen3ft.records.model import SavedAdapter
from qwen3ft.records.plan import MemoryPart, TrainPlan
from qwen3ft.records.training import MemoryStatus, TrainingMetrics
from qwen3ft.tracking.connection import connect
from qwen3ft.tracking.cursor import read_state
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.sender import Sender

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MODEL = "Qwen/Qwen3-4B-Thinking-2507"


def make_manifest() -> DatasetManifest:
    """The rows trained on."""
    source = DataSource(path="qa.jsonl", sha256="e" * 64, rows=12, role="train")
    return manifest(8, digest="d" * 64, sources=(source,))


def make_plan(run_dir: RunDir, attempt: int = 1) -> TrainPlan:
    """The plan of an attempt."""
    plan = plan_for(TINY, gpu_gb=None, max_memory_gb=2.0)
    changes = {
        "adapter": plan.adapter.model_copy(update={"target_modules": ("q_proj", "v_proj")}),
        "dataset": make_manifest(),
        "predicted": (MemoryPart(name="weights (4-bit)", bytes=2**29, formula="n / 2"),),
    }
    whole = plan.for_run(run_dir.path.name, str(run_dir.path), attempt=attempt, resume_from=None)
    return whole.model_copy(update=changes)


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


def journal_adapter(run_dir: RunDir) -> SavedAdapter:
    """A run that saved an adapter."""
    journal = Journal(run_dir)
    journal.run_started(run_dir.path.name, {}, {})
    saved = write_small_adapter(run_dir.path / "adapter", run_dir.path.name, model_name=MODEL)
    journal.artifacts(Path(saved.path), "adapter")
    return saved


def send_all(run_dir: RunDir, uri: str) -> None:
    """Send what MLflow lacks of the run."""
    Sender(run_dir, uri).send_all()


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Every value of a metric, by step."""
    points = connect(uri).client.get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in points)


def steps_of(uri: str, run_dir: RunDir, attempt: int = 1) -> list[int]:
    """The steps that MLflow has of an attempt."""
    run_id = read_state(run_dir).attempts[attempt].run_id
    return [step for step, _ in history(uri, run_id, "train/loss")]


def artifact_names(uri: str, run_id: str, folder: str) -> set[str]:
    """Paths of the artifacts in a folder of a run."""
    return {item.path for item in connect(uri).client.list_artifacts(run_id, folder)}
