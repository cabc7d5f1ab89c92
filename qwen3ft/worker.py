"""The child process: `python -m qwen3ft.worker KIND DIR`, or `wait` until told both.

Composes the stages of one job, reads its request from DIR and leaves an outcome or a failure there.
It is only ever executed, by `qwen3ft.worker_process`; a CUDA error, a leak or a native exit ends it
and nothing else. It dies with the process that started it. The one broad `except` of the project is
here: whatever a library raises becomes a classified failure on disk.
"""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from qwen3ft import logs
from qwen3ft.ask_records import AskOutcome, AskRequest
from qwen3ft.attempt import JobDir, read_record, write_record
from qwen3ft.data_records import DatasetManifest
from qwen3ft.errors import MemoryLeakError, OutOfMemoryError, PreemptedError
from qwen3ft.export_records import ExportRequest, ParityReport
from qwen3ft.failures import to_failure, translate
from qwen3ft.heartbeat import Heartbeat, StopRequest
from qwen3ft.memory_snapshot import record_history, write_report
from qwen3ft.preflight_records import Measurement, PreflightRequest
from qwen3ft.records import AttemptOutcome, ModelSnapshot, TrainPlan
from qwen3ft.requests import DataRequest, InferenceRequest, QuantizeRequest
from qwen3ft.result_records import InferenceReport
from qwen3ft.worker_process import WAIT
from qwen3ft.worker_start import (
    PREEMPTED_STATUS,
    die_with_parent,
    import_libraries,
    set_process_name,
    wait_for_job,
)

if TYPE_CHECKING:
    from types import FrameType

    from qwen3ft.train import TrainingEngine
    from qwen3ft.trainer import QATrainer

logger = logs.get_logger("worker")


class Job:
    """What every kind of job shares: its folder, its heartbeat and the request to stop."""

    def __init__(self, path: Path) -> None:
        self.dir = JobDir(path)
        self.heartbeat = Heartbeat(self.dir.heartbeat)
        self.stop = StopRequest()

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Training stops at its next step; any other phase has nothing to lose and stops now."""
        self.stop.signal_name = signal.Signals(number).name
        if self.heartbeat.phase not in {"train", "evaluate"}:
            raise self.stop.error()


def quantize(job: Job) -> ModelSnapshot:
    """Quantise the base model once."""
    from qwen3ft.model import ModelManager

    request = read_record(job.dir.request, QuantizeRequest)
    job.heartbeat.beat("quantize")
    return ModelManager(request.config).quantize(request)


def data(job: Job) -> DatasetManifest:
    """Read, check and tokenise the rows."""
    from qwen3ft.data import DataPipeline

    request = read_record(job.dir.request, DataRequest)
    job.heartbeat.beat("data")
    return DataPipeline(request.config).prepare(
        request.model,
        Path(request.target),
        progress=lambda _: job.heartbeat.beat("data"),
        known_rows=request.known_rows,
    )


def train(job: Job) -> AttemptOutcome:
    """One training attempt."""
    plan = read_record(job.dir.request, TrainPlan)
    engine, trainer = _load_for_training(job, plan)
    job.heartbeat.beat("train")
    engine.train_model(trainer)
    if plan.device == "cuda":
        write_report(job.dir.memory_report, "The end of training.")
    job.heartbeat.beat("finish")
    return engine.outcome(trainer)


def preflight(job: Job) -> Measurement:
    """The worst batches of a plan, measured; training follows in a process of its own."""
    from qwen3ft.memory import MemoryOptimizer
    from qwen3ft.preflight_measure import PhaseMeter, measure

    request = read_record(job.dir.request, PreflightRequest)
    plan = request.plan
    meter = PhaseMeter(job.dir, MemoryOptimizer(plan.max_memory_gb, plan.device))
    engine, trainer = _load_for_training(job, plan)
    meter.memory = engine.memory
    job.heartbeat.beat("train")
    return measure(engine, trainer, request, meter)


def _load_for_training(job: Job, plan: TrainPlan) -> tuple[TrainingEngine, QATrainer]:
    """The model with its adapter, the rows, and what trains them, as `plan` says."""
    from datasets import DatasetDict
    from transformers import set_seed

    from qwen3ft.config import TrainingConfig
    from qwen3ft.data import DataPipeline
    from qwen3ft.lora import LoRAAdapter
    from qwen3ft.memory import MemoryOptimizer
    from qwen3ft.model import ModelManager
    from qwen3ft.token_table import load_split
    from qwen3ft.train import TrainingEngine

    job.heartbeat.beat("load")
    memory = MemoryOptimizer(plan.max_memory_gb, plan.device)
    memory.optimize_for_training(lean=plan.offload_optimizer)
    if plan.memory_history and plan.device == "cuda":
        record_history()
    set_seed(plan.seed)
    config = TrainingConfig(model_name=plan.model.path)
    manager = ModelManager(config)
    model, tokenizer = manager.load_model_with_quantization(plan.model.path)
    by_torch = plan.gradient_checkpointing and plan.kernels == "plain"
    model = manager.prepare_for_training(model, gradient_checkpointing=by_torch)
    adapted = LoRAAdapter(plan.adapter).apply_lora(model)
    dataset = DatasetDict(
        {name: load_split(Path(plan.dataset.path), name) for name in ("train", "dev")}
    )
    engine = TrainingEngine(
        plan,
        job.dir,
        collator=DataPipeline(config).create_data_collator(tokenizer),
        memory=memory,
        stop=job.stop,
    )
    engine.progress.heartbeat = job.heartbeat
    return engine, engine.create_trainer(adapted, dataset, engine.create_training_args())


def inference(job: Job) -> InferenceReport:
    """Compare base, champion and candidate on held-out questions."""
    from qwen3ft.inference import run_inference
    from qwen3ft.memory import MemoryOptimizer

    request = read_record(job.dir.request, InferenceRequest)
    job.heartbeat.beat("load")
    budget_gb = request.budget_gb or request.config.max_memory_gb
    MemoryOptimizer(budget_gb, request.device).optimize_for_training()
    return run_inference(request, job.heartbeat.beat)


def export(job: Job) -> ParityReport:
    """Merge an adapter into its base, and compare the result with it."""
    from qwen3ft.memory import MemoryOptimizer
    from qwen3ft.merge import merge_adapter
    from qwen3ft.parity import measure_parity

    request = read_record(job.dir.request, ExportRequest)
    memory = MemoryOptimizer(request.config.max_memory_gb, request.device)
    memory.optimize_for_training()
    merge_adapter(
        Path(request.base),
        Path(request.adapter),
        Path(request.merged),
        progress=lambda done: job.heartbeat.beat("merge", done),
    )
    memory.enforce_budget()
    return measure_parity(request, memory, job.heartbeat.beat)


def answer(job: Job) -> AskOutcome:
    """Answer questions as they come, until told that there are no more."""
    from qwen3ft.ask import answer_session
    from qwen3ft.memory import MemoryOptimizer

    request = read_record(job.dir.request, AskRequest)
    job.heartbeat.beat("load")
    MemoryOptimizer(request.config.max_memory_gb, request.device).optimize_for_training()
    return answer_session(request, job.dir, job.heartbeat.beat)


KINDS: dict[str, Callable[[Job], BaseModel]] = {
    "quantize": quantize,
    "data": data,
    "preflight": preflight,
    "train": train,
    "inference": inference,
    "answer": answer,
    "export": export,
}


def main(kind: str, path: Path) -> int:
    """Run one job; the exit status is 0 only if an outcome was written."""
    set_process_name(kind)
    logs.configure(console=True, json_path=path / "log.jsonl")
    job = Job(path)
    signal.signal(signal.SIGTERM, job.on_signal)
    signal.signal(signal.SIGINT, job.on_signal)
    started = time.monotonic()
    try:
        import_libraries(kind)
        outcome = KINDS[kind](job)
    except Exception as error:
        failure = translate(error, job.heartbeat.phase)
        logger.error("%s failed after %.1f s: %s", kind, time.monotonic() - started, failure)
        if failure is not error:
            logger.info("traceback of the cause", exc_info=error)
        write_record(job.dir.failure, to_failure(failure))
        if isinstance(failure, (OutOfMemoryError, MemoryLeakError)):
            write_report(job.dir.memory_report, failure.what)  # while the error still holds it all
        _free(error)
        return PREEMPTED_STATUS if isinstance(failure, PreemptedError) else 1
    write_record(job.dir.outcome, outcome)
    logger.info("%s done in %.1f s", kind, time.monotonic() - started)
    return 0


def _free(error: BaseException) -> None:
    """Give back the memory that a failed job's frames still hold."""
    error.__traceback__ = None
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def run(kind: str, *arguments: str) -> int:
    """The process's whole life; its exit status."""
    die_with_parent()
    if kind == WAIT:
        set_process_name(WAIT)
        job = wait_for_job()
    else:
        job = kind, Path(*arguments)
    status = main(*job) if job is not None else 0
    gc.freeze()  # Python would end with looking for garbage in all that was imported: 2 s
    return status


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
