"""The product's inference stage, on some ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu_flow import make_rows
from benchmarks.machine import DeviceMemory
from benchmarks.scaling.process_peaks import ProcessPeaks
from benchmarks.scaling.training import STALL_SECONDS, print_logs
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import sha256_file
from qwen3ft.jobs.folders import JobDir, RunDir, read_record
from qwen3ft.jobs.launcher import try_worker
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.model.save_adapter import save_adapter
from qwen3ft.records.evaluation import InferenceReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.records.training import AttemptOutcome, Failure
from qwen3ft.units import GIB


def exam(values: dict[str, Any]) -> dict[str, Any]:
    """Compare the adapter of an earlier part with its base, as the inference stage does."""
    ranks = values["ranks"]
    folder, trained = Path(values["folder"]), RunDir(Path(values["trained"])).attempt(1)
    plan = read_record(trained.request, TrainPlan)
    outcome = read_record(trained.outcome, AttemptOutcome)
    make_rows(folder / "test.jsonl", values["questions"], values["tokens"])
    config = TrainingConfig(
        model_name=plan.model.path,
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "out"),
        inference_rows=values["questions"],
        max_new_tokens=values["new_tokens"],
        stop_asking_early=False,
        kernels="fused",
        stall_seconds=STALL_SECONDS,
    )
    request = InferenceRequest(
        config=config,
        model=plan.model,
        adapter=save_adapter(outcome, plan, config),
        questions_path=str(folder / "test.jsonl"),
        answers_path=str(folder / "answers.jsonl"),
        device=plan.device,
        batch_size=plan.memory.eval_batch_size,
        budget_gb=plan.max_memory_gb,
        places=(0,) * ranks if values.get("one_gpu") else tuple(range(ranks)),
    )
    memory = [DeviceMemory(index) for index in range(len(visible_gpus()))]
    peaks = ProcessPeaks()
    job = JobDir(folder / "inference").create(request)
    report = try_worker(request.worker_kind, job, InferenceReport, stall_seconds=STALL_SECONDS)
    if isinstance(report, Failure):
        print_logs(job)
        raise report.to_error()
    return {
        "answer_seconds": report.answer_seconds,
        "predicted_seconds": report.predicted_seconds,
        "stage_seconds": report.seconds,
        "answered_by": report.answered_by,
        "generated": report.generated,
        "peak_gb": [(report.peak_bytes or 0) / GIB],
        "budget_gb": plan.max_memory_gb,
        "nvml_gb": [each.stop() for each in memory],
        "nvml_process_gb": peaks.stop(),
        "digest": sha256_file(Path(report.answers_path)),
    }
