"""Answer a failed attempt with the next plan, or give up with a reason."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import get_logger, without_secrets
from qwen3ft.recovery.adjust import FailedAttempt, GiveUp, Retry, decide_retry
from qwen3ft.training import checkpoint
from tasks.names import adjust_name, name_of

logger = get_logger("adjust")


@task(name="adjust", task_run_name=name_of(adjust_name), cache_policy=NO_CACHE)
@without_secrets()
def adjust_parameters(config: TrainingConfig, failed: Sequence[FailedAttempt]) -> Retry | GiveUp:
    """Clean up after the last attempt of `failed`, then decide what follows."""
    plan, failure = failed[-1]
    run = RunDir(Path(plan.run_dir))
    # A kill in the middle of a write leaves a hidden folder.
    for leftover in run.attempt(plan.attempt).checkpoints.glob(".*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folders = [job.checkpoints for job in run.attempts()]
    newest = checkpoint.newest_to_resume(folders, plan)
    decision = decide_retry(
        failed,
        # A continued run has its full number of attempts again.
        max_attempts=config.max_attempts + failed[0].plan.attempt - 1,
        allow_degraded=config.allow_degraded,
        newest_checkpoint=str(newest.path) if newest else None,
    )
    logger.info("attempt %d: %s -> %s", plan.attempt, failure.kind, decision.reason)
    return decision
