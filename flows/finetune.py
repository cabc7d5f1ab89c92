"""The flow `qwen3-finetune`: from question-answer files to a promoted adapter.

environment - model - lora - data - plan - (train - adjust)* - save - inference - promote

Each word is a task of its own. A failed training attempt is answered by `adjust`, which makes the
next plan; the loop in `train_with_recovery` is the only owner of those retries. This process loads
neither torch nor CUDA: whatever computes runs in a worker process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from qwen3ft import checkpoint, logs
from qwen3ft.adjust import GiveUp
from qwen3ft.attempt import RunDir, write_record
from qwen3ft.card import build_card, to_markdown
from qwen3ft.config import TrainingConfig
from qwen3ft.cursor import read_state
from qwen3ft.errors import FinetuneError, TransientError
from qwen3ft.failures import to_error, to_failure
from qwen3ft.journal import Journal, RunStatus
from qwen3ft.mirror import Mirror, replay_unsent
from qwen3ft.prepare import preview_plan
from qwen3ft.records import (
    AttemptOutcome,
    AttemptSummary,
    Failure,
    RunCard,
    TrainPlan,
)
from qwen3ft.tracking_uri import default_tracking_uri, run_url
from tasks.adjust import adjust_parameters
from tasks.data import prepare_data
from tasks.environment import check_environment
from tasks.inference import compare_answers
from tasks.lora import configure_lora
from tasks.model import prepare_model
from tasks.plan import plan_training
from tasks.policies import hide_known_tracebacks
from tasks.promote import find_champion, promote, register
from tasks.save import save
from tasks.train import finished_attempt, train_attempt

__all__ = ["preview_plan", "qwen3_finetune", "run_in_process"]

logger = logs.get_logger("flow")

MOST_DESCRIPTION_CHARACTERS = 5000
"""Of the card at the top of the run's page in MLflow, which refuses longer tags."""

CLOSE_SECONDS = 30.0
"""How long the end of a run waits for MLflow to take what is left."""


def _run_name() -> str:
    """What the Prefect UI lists: the model and when."""
    config = flow_run.parameters.get("config") or {}
    values = config if isinstance(config, dict) else config.model_dump()
    model = str(values.get("model_name", TrainingConfig().model_name)).rstrip("/")
    return f"{model.rpartition('/')[2]} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"


def _page() -> str | None:
    """This run's page; None without a server that has pages (Prefect then says 'None/flow-...')."""
    url = flow_run.ui_url or ""
    return url if url.startswith("http") else None


@flow(name="qwen3-finetune", flow_run_name=_run_name, retries=0)
def qwen3_finetune(
    config: TrainingConfig = TrainingConfig(),  # noqa: B008  frozen, and shown as the run's form
    continue_run: str | None = None,
) -> State[Any]:
    """Fine-tune, prove and promote.

    Args:
        config: What to do.
        continue_run: Id of an earlier run whose folder, checkpoints and results are taken up.
    """
    run = open_run(config, continue_run or str(flow_run.id))
    clock = StageClock()
    with tracked(run, config):
        with clock("environment"):
            environment = check_environment()
        with clock("model"):
            model = prepare_model(config, environment, run)
        with clock("lora"):
            adapter = configure_lora(config, model)
        with clock("data"):
            dataset = prepare_data(config, model, run)
            Journal(run).dataset(dataset)
        with clock("plan"):
            first = plan_training(config, environment, model, adapter, dataset)
        with clock("train"):
            plan, outcome, attempts = train_with_recovery(config, first, run)
        with clock("save"):
            saved = save(config, plan, outcome)
            saved = unless_unreachable(register, saved, config, saved, str(run.path))
            champion = unless_unreachable(find_champion, None, config)
        with clock("inference"):
            report = compare_answers(config, plan, saved, champion)
        with clock("promote"):
            verdict = promote(saved, report, champion, str(run.path))
        card = build_card(config, plan, outcome, saved, report, verdict, attempts, clock.seconds)
        publish(run, card)
    return Completed(
        message=f"{card.verdict} (exact match {card.base_score:.1%} -> "
        f"{card.tuned_score:.1%}, peak {card.peak_memory_gb:.2f} GB)"
    )


def train_with_recovery(
    config: TrainingConfig, first: TrainPlan, run: RunDir
) -> tuple[TrainPlan, AttemptOutcome, list[AttemptSummary]]:
    """Attempt, adjust, attempt again, until one completes or `adjust` gives up.

    Raises:
        FinetuneError: the last failure's class, saying what was tried.
    """
    if (outcome := finished_attempt(run, first)) is not None:
        logger.info("training was finished by attempt %d of this run", outcome.attempt)
        return _given(first, run, outcome.attempt), outcome, []
    plan = _given(first, run, len(run.attempts()) + 1)
    history: list[AttemptSummary] = []
    while True:
        started = time.monotonic()
        state = train_attempt(plan, return_state=True)
        result = state.result(raise_on_failure=False)
        if not isinstance(result, (AttemptOutcome, FinetuneError)):
            raise result  # cancelled, or a defect of ours: not an attempt's failure
        failure = to_failure(result) if isinstance(result, FinetuneError) else None
        history.append(_summary(plan, failure, time.monotonic() - started))
        show_attempts(history)
        if isinstance(result, AttemptOutcome):
            return plan, result, history
        assert failure is not None
        decision = adjust_parameters(config, plan, failure, history)
        if isinstance(decision, GiveUp):
            raise to_error(decision.failure)
        plan = decision.plan
        if "max_sequence_length" in decision.change:
            shorter = {"max_sequence_length": plan.max_sequence_length}
            rows = prepare_data(config.model_copy(update=shorter), plan.model, run)
            plan = plan.model_copy(update={"dataset": rows})


def _given(plan: TrainPlan, run: RunDir, attempt: int) -> TrainPlan:
    """The plan as an attempt of this run, from the newest checkpoint that fits it."""
    folders = [job.checkpoints for job in run.attempts()]
    newest = checkpoint.newest_verified(folders, checkpoint.lineage(plan))
    resume_from = str(newest.path) if newest else None
    return plan.for_run(run.path.name, str(run.path), attempt=attempt, resume_from=resume_from)


def _summary(plan: TrainPlan, failure: Failure | None, seconds: float) -> AttemptSummary:
    resumed = Path(plan.resume_from).name.removeprefix("step-") if plan.resume_from else None
    return AttemptSummary(
        attempt=plan.attempt,
        outcome=failure.kind if failure else "completed",
        detail=failure.what if failure else "best checkpoint kept",
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        gradient_checkpointing=plan.gradient_checkpointing,
        learning_rate=plan.learning_rate,
        resumed_from_step=int(resumed) if resumed else None,
        seconds=seconds,
    )


# --- around the story ---


class StageClock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure the body as `stage`."""
        started = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - started


def open_run(config: TrainingConfig, run_id: str) -> RunDir:
    """The run's folder, ready for logs; readable by its owner alone."""
    run = RunDir(Path(config.runs_dir).resolve() / run_id)
    run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    logs.configure(console=False, json_path=run.log)
    hide_known_tracebacks()
    write_record(run.path / "config.json", config)
    return run


@contextmanager
def tracked(run: RunDir, config: TrainingConfig) -> Iterator[None]:
    """Keep the journal of this run and mirror it into MLflow meanwhile."""
    uri = default_tracking_uri()
    journal = Journal(run)
    tags = {
        "prefect.flow_run_id": flow_run.id,
        "prefect.flow_run_url": _page() or "",
    }
    mirror = Mirror(run, uri)
    mirror.start()
    # What an outage kept from MLflow in earlier runs goes there now, behind this run's back.
    backlog = partial(replay_unsent, run.path.parent, uri, current=run)
    threading.Thread(target=backlog, daemon=True).start()
    journal.run_started(_run_name(), config.model_dump(mode="json"), tags)
    status: RunStatus = "FAILED"
    try:
        yield
        status = "FINISHED"
    except FinetuneError as error:
        journal.tags({"failure": type(error).__name__})
        journal.text("failure.txt", str(error))
        raise
    finally:
        journal.run_finished(status)
        if not mirror.close(CLOSE_SECONDS):
            logger.warning("MLflow does not have all of this run yet; later: qwen3ft sync")


def unless_unreachable(task: Any, otherwise: Any, *arguments: Any) -> Any:
    """The task's result, or `otherwise` when the service it needs stayed out of reach."""
    state = task(*arguments, return_state=True)
    result = state.result(raise_on_failure=False)
    if isinstance(result, TransientError):
        logger.warning("%s: %s", task.name, result.what)
        return otherwise
    return state.result()


def show_attempts(history: list[AttemptSummary]) -> None:
    """The table of attempts on the flow run's page."""
    create_table_artifact(
        key="attempts",
        table=[attempt.model_dump(mode="json") for attempt in history],
        description="Every training attempt, what ended it, and with which settings",
    )


def publish(run: RunDir, card: RunCard) -> None:
    """The result card: on disk, on the flow run's page and in MLflow, with links both ways."""
    url = run_url(default_tracking_uri(), read_state(run))
    card = card.model_copy(update={"prefect_url": _page(), "mlflow_url": url})
    markdown = to_markdown(card)
    write_record(run.path / "card.json", card)
    (run.path / "card.md").write_text(markdown, encoding="utf-8")
    journal = Journal(run)
    journal.text("card.md", markdown)
    journal.metrics(
        {
            "held_out_loss/before": card.held_out_loss_before,
            "held_out_loss/after": card.held_out_loss_after,
            "memory/peak_gb": card.peak_memory_gb,
        }
    )
    shown = {"mlflow.note.content": markdown[:MOST_DESCRIPTION_CHARACTERS]}
    journal.tags({"verdict": card.verdict, "attempts": len(card.attempts), **shown})
    create_markdown_artifact(key="result-card", markdown=markdown, description=card.title)
    if url:
        create_link_artifact(key="mlflow-run", link=url, link_text="This run in MLflow")


# --- without a server ---


def run_in_process(config: TrainingConfig, continue_run: str | None = None) -> State[Any]:
    """The same flow in this process; Prefect uses a server if one is configured, else its own."""
    # A busy machine needs longer than Prefect's 20 s to start its temporary server.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    return qwen3_finetune(config, continue_run, return_state=True)
