"""The kinds of jobs that a worker runs: each reads its request and returns its outcome.

Libraries are imported inside the functions, because a worker runs one kind of job.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from qwen3ft.errors import RanksPartedError
from qwen3ft.jobs.folders import JobDir, read_record
from qwen3ft.jobs.heartbeat import Heartbeat, StopRequest
from qwen3ft.machine.memory_report import record_history, write_memory_report
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.evaluation import InferenceReport
from qwen3ft.records.model import ModelSnapshot
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.preflight import Measurement, PreflightRequest
from qwen3ft.records.requests import (
    AskRequest,
    ChatEnded,
    DataRequest,
    ExportRequest,
    InferenceRequest,
    ParityReport,
    QuantizeRequest,
    TokenizerReport,
    TokenizerRequest,
)
from qwen3ft.records.serving import ServeEnded, ServeRequest
from qwen3ft.records.training import AttemptOutcome, RankOutcome
from qwen3ft.units import GIB
from qwen3ft.worker.agent import ANSWERING_RANK, RANK, ask_ranks, join_ranks, train_ranks

if TYPE_CHECKING:
    from types import FrameType

    import torch

    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.training.engine import TrainingEngine
    from qwen3ft.training.ranks import Ranks
    from qwen3ft.training.trainer import QATrainer

LINGER_SECONDS = 2.0
"""Time that a rank which lost the others leaves the agent to see who ended first."""


class Job:
    """One job of a worker: its folder, its heartbeat and the request to stop."""

    def __init__(self, path: Path) -> None:
        self.dir = JobDir(path)
        self.heartbeat = Heartbeat(self.dir.heartbeat)
        self.stop = StopRequest()
        self.is_broken_off = False

    def on_signal(self, number: int, _: FrameType | None) -> None:
        """Stop training at its next step, with a checkpoint; stop any other phase at once."""
        self.stop.signal_name = signal.Signals(number).name
        if self.heartbeat.phase not in {"train", "evaluate"}:
            self.is_broken_off = True
            raise self.stop.error()


def quantize_job(job: Job) -> ModelSnapshot:
    """Quantise the base model."""
    from qwen3ft.model.manager import ModelManager

    request = read_record(job.dir.request, QuantizeRequest)
    job.heartbeat.beat("quantize")
    return ModelManager(request.config).quantize(request)


def tokenizer_job(job: Job) -> TokenizerReport:
    """Try a tokenizer from elsewhere; this process ends if that takes too much."""
    from qwen3ft.chat.limits import RENDER_BYTES, limit_process
    from qwen3ft.chat.probes import PROBE_CPU_SECONDS, probe_tokenizer
    from qwen3ft.chat.tokenizer import load_tokenizer
    from qwen3ft.embedded import MODEL_DIR

    request = read_record(job.dir.request, TokenizerRequest)
    job.heartbeat.beat("tokenizer")
    # transformers imports on first use, and torch's build for CUDA maps more than the limits allow.
    load_tokenizer(MODEL_DIR)
    limit_process(PROBE_CPU_SECONDS, RENDER_BYTES)
    return TokenizerReport(rendered=probe_tokenizer(Path(request.folder)))


def data_job(job: Job) -> DatasetManifest:
    """Read, check and tokenise the rows."""
    from qwen3ft.data.pipeline import DataPipeline

    request = read_record(job.dir.request, DataRequest)
    job.heartbeat.beat("data")
    return DataPipeline(request.sources.config).prepare(
        request.model,
        Path(request.target),
        progress=lambda _: job.heartbeat.beat("data"),
        known_rows=request.known_rows,
        sources=request.sources,
    )


def train_job(job: Job) -> AttemptOutcome:
    """Run one training attempt."""
    plan = read_record(job.dir.request, TrainPlan)
    engine, trainer = _load_for_training(job, plan)
    job.heartbeat.beat("train")
    engine.train_model(trainer)
    if plan.device == "cuda":
        write_memory_report(job.dir.memory_report, "The end of training.")
    job.heartbeat.beat("finish")
    return engine.outcome(trainer)


def rank_job(job: Job) -> AttemptOutcome | RankOutcome:
    """Train as one of the ranks of an attempt, in a folder of its own below the attempt's."""
    from qwen3ft.training.ranks import Ranks

    plan, rank = read_record(job.dir.request, TrainPlan), int(job.dir.path.name)
    attempt = JobDir(job.dir.path.parents[1])
    job.heartbeat.beat("load")
    with _after_the_first(job):
        ranks = Ranks(rank, plan.ranks)
        engine, trainer = _load_for_training(job, plan, attempt if rank == 0 else None, ranks)
        ranks.meet(plan, attempt.meeting_place)  # late: transformers would take notice of it
        engine.memory.enforce_budget()  # lowers the allocator's cap by what NCCL took
        job.heartbeat.beat("train")
        engine.train_model(trainer)
        job.heartbeat.beat("finish")
        ranks.leave()
        return engine.outcome(trainer) if rank == 0 else engine.rank_outcome()


@contextmanager
def _after_the_first(job: Job) -> Iterator[None]:
    """Let the agent see the end of the rank that ended first, which has the cause, before this."""
    try:
        yield
    except RanksPartedError:
        job.stop.wait(LINGER_SECONDS)
        if job.stop.signal_name is not None:
            raise job.stop.error() from None
        raise


def preflight_job(job: Job) -> Measurement:
    """Measure the worst batches of a plan; training follows in its own process."""
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.preflight.answers import measure_answers
    from qwen3ft.preflight.measure import PhaseMeter, measure

    request = read_record(job.dir.request, PreflightRequest)
    plan = request.plan
    meter = PhaseMeter(job.dir, MemoryOptimizer(plan.max_memory_gb, plan.device))
    engine, trainer = _load_for_training(job, plan)
    meter.memory = engine.memory
    buffers = _exchange_buffers(plan)
    job.heartbeat.beat("train")
    measured = measure(engine, trainer, request, meter)
    del buffers
    if request.answers is None:
        return measured
    job.heartbeat.beat("answers")
    trainer.optimizer = trainer.lr_scheduler = None  # makes room
    answers = measure_answers(trainer.model, plan, request.answers)
    return measured.model_copy(update={"answers": answers})


def _exchange_buffers(plan: TrainPlan) -> torch.Tensor:
    """Take the memory in which a rank of several sums gradients, as a preflight is alone."""
    import torch

    from qwen3ft.planning.footprint import exchange_bytes
    from qwen3ft.planning.workload import workload_of

    size = exchange_bytes(workload_of(plan))
    return torch.ones(size, dtype=torch.uint8, device=plan.device)


def _load_for_training(
    job: Job, plan: TrainPlan, attempt: JobDir | None = None, ranks: Ranks | None = None
) -> tuple[TrainingEngine, QATrainer]:
    """Load the model with its adapter and the rows; return the engine and the trainer.

    Args:
        job: The job; its folder receives metrics and checkpoints unless there is another `attempt`.
        plan: The plan.
        attempt: Folder for metrics and checkpoints.
        ranks: The ranks of the attempt, if there are several.
    """
    from datasets import DatasetDict
    from transformers import set_seed

    from qwen3ft.config import TrainingConfig
    from qwen3ft.data.pipeline import DataPipeline
    from qwen3ft.data.token_table import load_split
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.model.adapter import LoRAAdapter
    from qwen3ft.model.manager import ModelManager
    from qwen3ft.training.engine import TrainingEngine

    job.heartbeat.beat("load")
    memory = MemoryOptimizer(plan.max_memory_gb, plan.device)
    memory.optimize_for_training(lean=plan.memory.offload_optimizer)
    if plan.memory_history and plan.device == "cuda":
        record_history()
    set_seed(plan.seed)
    config = TrainingConfig(model_name=plan.model.path)
    manager = ModelManager(config)
    model, tokenizer = manager.load_model_with_quantization(plan.model.path)
    by_torch = plan.memory.gradient_checkpointing and plan.memory.kernels == "plain"
    model = manager.prepare_for_training(model, gradient_checkpointing=by_torch)
    adapted = LoRAAdapter(plan.adapter).apply_lora(model)
    dataset = DatasetDict(
        {name: load_split(Path(plan.dataset.path), name) for name in ("train", "dev")}
    )
    engine = TrainingEngine(
        plan,
        attempt or job.dir,
        collator=DataPipeline(config).create_data_collator(tokenizer),
        memory=memory,
        stop=job.stop,
        ranks=ranks,
    )
    engine.progress.heartbeat = job.heartbeat
    return engine, engine.create_trainer(adapted, dataset, engine.create_training_args())


def inference_job(job: Job) -> InferenceReport:
    """Compare base, champion and candidate on held-out questions."""
    from qwen3ft.evaluation.inference import run_inference

    request = read_record(job.dir.request, InferenceRequest)
    memory = _memory_for_answers(job, request)
    report = run_inference(request, job.heartbeat.beat)
    return report.model_copy(update={"peak_bytes": int(memory.peak()[2] * GIB)})


def answering_rank_job(job: Job) -> InferenceReport | RankOutcome:
    """Answer as one of the ranks of an inference test, in a folder of its own below the test's."""
    from qwen3ft.evaluation.inference import LeftToRank0Error, run_inference
    from qwen3ft.training.ranks import Ranks

    request, rank = read_record(job.dir.request, InferenceRequest), int(job.dir.path.name)
    memory = _memory_for_answers(job, request)
    with _after_the_first(job):
        ranks = Ranks(rank, request.ranks)
        # Not over NCCL, whose threads may not run while a step is captured.
        ranks.meet(request, JobDir(job.dir.path.parents[1]).meeting_place, gradients=False)
        if rank > 0:  # it has the same answers
            own = {"answers_path": str(job.dir.path / "answers.jsonl")}
            request = request.model_copy(update=own)
        try:
            report = run_inference(request, job.heartbeat.beat, ranks)
        except LeftToRank0Error:
            return RankOutcome(peak_memory_gb=memory.peak()[2])
        ranks.leave()
    peak_gb = memory.peak()[2]
    if rank > 0:
        return RankOutcome(peak_memory_gb=peak_gb)
    return report.model_copy(update={"peak_bytes": int(peak_gb * GIB)})


def _memory_for_answers(job: Job, request: InferenceRequest) -> MemoryOptimizer:
    """Limit this process to the budget of the inference test."""
    from qwen3ft.machine.memory import MemoryOptimizer

    job.heartbeat.beat("load")
    memory = MemoryOptimizer(request.budget_gb or request.config.max_memory_gb, request.device)
    memory.optimize_for_training()
    return memory


def export_job(job: Job) -> ParityReport:
    """Merge an adapter into its base, and compare the result with base and adapter."""
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.serving.gguf_parity import write_gguf
    from qwen3ft.serving.merge import merge_adapter
    from qwen3ft.serving.parity import measure_parity

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
    if request.gguf is not None:
        job.heartbeat.beat("write GGUF", 0)
        write_gguf(request, job.dir.path)
    return measure_parity(request, memory, job.heartbeat.beat, job.dir.path)


def answer_job(job: Job) -> ChatEnded:
    """Answer questions as they arrive, until the session ends."""
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.serving.answering import answer_session

    request = read_record(job.dir.request, AskRequest)
    job.heartbeat.beat("load")
    MemoryOptimizer(request.config.max_memory_gb, request.device).optimize_for_training()
    return answer_session(request, job.dir, job.heartbeat.beat)


def serve_job(job: Job) -> ServeEnded:
    """Answer for the server, until it ends."""
    from qwen3ft.machine.memory import MemoryOptimizer
    from qwen3ft.serving.engines.own import serve_session
    from qwen3ft.serving.engines.relay import relay_session

    request = read_record(job.dir.request, ServeRequest)
    job.heartbeat.beat("load")
    if request.engine != "own":
        return relay_session(request, job.dir.path, job.heartbeat.beat)
    MemoryOptimizer(request.config.max_memory_gb, request.device).optimize_for_training()
    return serve_session(request, job.heartbeat.beat)


KINDS: dict[str, Callable[[Job], BaseModel]] = {
    "tokenizer": tokenizer_job,
    "quantize": quantize_job,
    "data": data_job,
    "preflight": preflight_job,
    "train": train_job,
    "ranks": train_ranks,
    "join": join_ranks,
    RANK: rank_job,
    "inference": inference_job,
    "answering-ranks": ask_ranks,
    ANSWERING_RANK: answering_rank_job,
    "answer": answer_job,
    "export": export_job,
    "serve": serve_job,
}
