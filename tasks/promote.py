"""Stage 10: into the registry, and into use if it is better."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import (
    ChampionChangedError,
    RolledBackError,
    TrackingUnavailableError,
    TransientError,
)
from qwen3ft.evaluation.gate import decide_promotion, gate_policy
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import get_logger, mask_secrets, without_secrets
from qwen3ft.operations.night import request_tags
from qwen3ft.records.evaluation import Champion, InferenceReport, Verdict
from qwen3ft.records.model import SavedAdapter
from qwen3ft.registry.aliases import VERDICT_TAG
from qwen3ft.registry.lookup import fetch_version
from qwen3ft.registry.moves import Change, Mover
from qwen3ft.registry.registry import Registry
from qwen3ft.tracking.cursor import parent_run_id, wait_until_sent
from qwen3ft.tracking.uri import default_tracking_uri, is_answering
from tasks.names import name_of, promote_name
from tasks.policies import is_transient

logger = get_logger("promote")

REGISTRY_DELAYS_SECONDS = [2.0, 10.0]

UPLOAD_SECONDS = 180.0
"""Longest wait for the adapter's upload, which runs in the background, while MLflow answers."""

OUTAGE_SECONDS = 20.0
"""Longest outage of MLflow meanwhile; `qwen3ft up --stay` restarts it in half of that."""

PROBE_SECONDS = 2.0


def may_be_retried(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Return True if registering may succeed when repeated, unless a wait timed out."""
    error = state.result(raise_on_failure=False)
    waited = isinstance(error, TransientError) and "waited_seconds" in error.facts
    return is_transient(task, run, state) and not waited


@task(
    name="register",
    task_run_name="register",
    cache_policy=NO_CACHE,
    retries=len(REGISTRY_DELAYS_SECONDS),
    retry_delay_seconds=REGISTRY_DELAYS_SECONDS,
    retry_condition_fn=may_be_retried,
)
@without_secrets()
def register(config: TrainingConfig, saved: SavedAdapter, run: str) -> SavedAdapter:
    """Make the uploaded adapter a version of the registered model."""
    started = time.monotonic()
    sent = wait_for_upload(RunDir(Path(run)))
    run_id = parent_run_id(RunDir(Path(run)))
    if not sent or run_id is None:
        waited_seconds = round(time.monotonic() - started, 1)
        raise TrackingUnavailableError(
            f"MLflow has not taken this run's adapter within {waited_seconds:.0f} s.",
            why=f"{mask_secrets(default_tracking_uri())} cannot be reached, or is too slow.",
            next_command="qwen3ft status",
            waited_seconds=waited_seconds,
        )
    named = saved.model_copy(
        update={"mlflow_run_id": run_id, "registered_model": config.registered_name}
    )
    tags = {"run": Path(run).name, **request_tags(RunDir(Path(run)))}
    version = Registry(default_tracking_uri()).register(run_id, named, tags)
    return named.model_copy(update={"version": version})


def wait_for_upload(run: RunDir) -> bool:
    """Wait until MLflow has all of the run so far; False if it is too slow or down."""
    answered = started = time.monotonic()
    while not wait_until_sent(run, PROBE_SECONDS):
        now = time.monotonic()
        if is_answering(default_tracking_uri()):
            answered = now
        if now - started > UPLOAD_SECONDS or now - answered > OUTAGE_SECONDS:
            return False
    return True


@task(
    name="champion",
    task_run_name="champion",
    cache_policy=NO_CACHE,
    retries=1,
    retry_delay_seconds=2.0,
    retry_condition_fn=is_transient,
)
@without_secrets()
def find_champion(config: TrainingConfig) -> Champion | None:
    """Return the adapter in use, fetched and verified; None before the first promotion."""
    registry = Registry(default_tracking_uri())
    champion = registry.champion(config.registered_name)
    if champion is None:
        return None
    path = fetch_version(config, registry, champion)
    return champion.model_copy(update={"adapter_path": str(path)})


@task(
    name="promote",
    task_run_name=name_of(promote_name),
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[2.0, 10.0],
    retry_condition_fn=is_transient,
)
@without_secrets()
def promote(
    config: TrainingConfig,
    saved: SavedAdapter,
    report: InferenceReport,
    champion: Champion | None,
    run: str,
) -> Verdict:
    """Decide, and move an alias: champion if promoted, challenger if kept."""
    if saved.registered_model is None or saved.version is None:
        reason = (
            "the registry could not be reached, so the adapter in use is not known; "
            f"continue with: {RunDir(Path(run)).resume_command}"
        )
        return Verdict(decision="deferred", reasons=(reason,))
    if champion is not None and champion.version == saved.version:
        return _given_before(saved, champion)
    verdict = decide_promotion(report, saved, champion=champion, policy=gate_policy(config))
    registry, why = Registry(default_tracking_uri()), verdict.sentence
    if verdict.decision == "promoted":
        change = Change(by=Mover(kind="flow", name=Path(run).name), verdict=why)
        expected = champion.version if champion else None
        try:
            registry.promote(saved.registered_model, saved.version, expected, change)
        except RolledBackError as error:
            return verdict.model_copy(update={"decision": "kept", "reasons": (error.what,)})
        except ChampionChangedError as error:  # by a run beside this one, on another GPU
            reason = f"{error.what} Compare with it: {RunDir(Path(run)).resume_command}"
            return verdict.model_copy(update={"decision": "deferred", "reasons": (reason,)})
    elif verdict.decision == "kept":
        try:
            registry.set_challenger(saved.registered_model, saved.version, why)
        except TransientError as error:  # an alias is not worth failing the run
            logger.warning("the kept adapter is not named challenger: %s", error.what)
    return verdict


def _given_before(saved: SavedAdapter, champion: Champion) -> Verdict:
    """Return the verdict of a run that was killed after its promotion and is now resumed."""
    # compared with itself, its adapter would not be better, and its card would say so
    sentence = champion.tags.get(VERDICT_TAG, "").removeprefix("promoted: ")
    return Verdict(
        decision="promoted",
        reasons=(sentence or "this run put it into use before it was interrupted",),
        registered_model=saved.registered_model,
        version=saved.version,
    )
