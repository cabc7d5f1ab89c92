"""Inference stage: compare the saved adapter with the base model and the champion."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import (
    EnvironmentNotReadyError,
    FinetuneError,
    OutOfMemoryError,
    PreemptedError,
    TrainingFailureError,
)
from qwen3ft.evaluation.judge import judge_answers
from qwen3ft.evaluation.wording import judge_note, judge_text
from qwen3ft.jobs.folders import JobDir, RunDir
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.logs import get_logger, without_secrets
from qwen3ft.planning.decoder_sizes import may_decode
from qwen3ft.records.evaluation import Champion, InferenceReport
from qwen3ft.records.model import SavedAdapter
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.report.figures import write_png
from qwen3ft.report.score_figure import SCORES_PICTURE, scores_figure
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.run_metrics import report_metrics
from tasks.names import inference_name, name_of

logger = get_logger("inference")


@task(name="inference", task_run_name=name_of(inference_name), cache_policy=NO_CACHE)
@without_secrets()
def compare_answers(
    config: TrainingConfig, plan: TrainPlan, saved: SavedAdapter, champion: Champion | None
) -> InferenceReport:
    """Answer the held-out questions with every model that is on disk."""
    run = RunDir(Path(plan.run_dir))
    job = run.job("inference")
    decodes = may_decode(plan.device, config.kernels)
    request = InferenceRequest(
        config=config,
        model=plan.model,
        adapter=saved,
        champion=champion,
        questions_path=str(Path(plan.dataset.path) / "test.jsonl"),
        answers_path=str(job.path / "answers.jsonl"),
        device=plan.device,
        batch_size=plan.memory.eval_batch_size,
        budget_gb=plan.max_memory_gb,
        # The answers of transformers depend on who is asked beside whom: one rank gives them all.
        # Other hosts have left: they joined for the training.
        places=tuple(range(len(plan.places_on(0)))) if decodes else (0,),
    )
    while True:
        try:
            return answered(job, request)
        except (OutOfMemoryError, TrainingFailureError, EnvironmentNotReadyError) as error:
            again = asked_again(request, error) if decodes else None
            if again is None:
                raise
            request = again


def answered(job: JobDir, request: InferenceRequest) -> InferenceReport:
    """Have the questions answered by a worker, or by one for each rank."""
    kind, stall_seconds = request.worker_kind, request.stall_seconds
    job.create(request)
    return run_worker(kind, job, InferenceReport, stall_seconds=stall_seconds, last=True)


def asked_again(request: InferenceRequest, error: FinetuneError) -> InferenceRequest | None:
    """Return the request to make after a failure: fewer ranks, and at last no decoder.

    A night must not be lost to either. None if the failure is that of all of them.
    """
    if isinstance(error, PreemptedError) or request.without_decoder:
        return None
    if isinstance(error, EnvironmentNotReadyError) and (
        request.ranks == 1 or "rank" not in error.facts
    ):
        return None  # else a GPU is gone since the training
    rank = error.facts.get("rank", request.ranks - 1)
    if left := tuple(place for place in request.places if place != request.places[rank]):
        logger.warning("the questions are asked again on %d ranks: %s", len(left), error)
        return request.model_copy(update={"places": left})
    logger.warning("the inference test begins again without the decoder: %s", error)
    why = f"the decoder's process failed: {error.what[:200]}"
    return request.model_copy(update={"without_decoder": why, "places": (request.places[0],)})


@task(name="judge", task_run_name="judge", cache_policy=NO_CACHE)
@without_secrets()
def ask_judge(config: TrainingConfig, report: InferenceReport) -> InferenceReport:
    """Add the judge's opinion to the report; it can neither fail nor decide the run."""
    return with_judge(config, report)


def with_judge(config: TrainingConfig, report: InferenceReport) -> InferenceReport:
    """Add the opinion of the judge, if one is configured, and log it."""
    judge = judge_answers(config, Path(report.answers_path))
    if judge is None:
        return report
    if counts := judge_text(judge):
        logger.info("judge %s: %s", judge.model, counts)
    if note := judge_note(judge):
        logger.warning("%s", note)
    return report.model_copy(update={"judge": judge})


def log_inference(run: RunDir, report: InferenceReport) -> None:
    """Send scores and answers to MLflow."""
    journal = Journal(run)
    journal.table(Path(report.answers_path))
    journal.json("inference/report.json", report.model_dump(mode="json"))
    journal.artifacts(Path(report.scores_path), "inference")
    journal.metrics(report_metrics(report))
    folder, name = SCORES_PICTURE.split("/")
    journal.artifacts(write_png(scores_figure(report), run.path / name), folder)
