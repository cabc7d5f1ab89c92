"""The flow `qwen3-finetune`: from question-answer files to a promoted adapter.

environment - model - lora - data - plan - preflight - (train - adjust)* - save - inference -
(judge) - promote

First a run finds out whether it is needed at all (`flows.nightly`). Each word above is a task. A
failed training attempt is answered by `adjust`, which makes the next plan; the loop in
`train_with_recovery` alone retries training. This process loads neither torch nor CUDA: worker
processes do the computing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.hosts import JoinedHosts, failure_of_hosts
from flows.naming import run_name
from flows.nightly import (
    claim_tonight,
    end_as_taken,
    find_request,
    for_night,
    is_nightly,
    named_for_task,
    seen_before,
)
from flows.notify import notify_failure, record_run, send_notice
from flows.parameters import over_deployment
from flows.reporting import CANCELLED, RunReporter, reported
from flows.resume import (
    cancel_duplicate_resumes,
    refuse_second_resume,
    settings_to_finish,
    settings_to_resume,
)
from flows.run_context import (
    commands_about,
    end_without_training,
    hold_devices,
    make_folders,
    mirror_to_mlflow,
    nothing_new,
    notice_of,
    open_run,
    or_if_unreachable,
    survive_closed_pipes,
    warn_of_limits,
)
from flows.temporary_server import temporary_server
from qwen3ft import logs
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import private_files
from qwen3ft.errors import CancelledError, EnvironmentNotReadyError
from qwen3ft.evaluation.ability import read_ability_rows
from qwen3ft.jobs.folders import RunDir
from qwen3ft.jobs.processes import workers_ahead
from qwen3ft.machine.gpu_choice import only_visible
from qwen3ft.operations.new_data import compare_data, explain_training, find_known_rows
from qwen3ft.operations.night import Night
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure
from qwen3ft.recovery.adjust import FailedAttempt, GiveUp
from qwen3ft.recovery.shared_gpu import fit_to_free_memory
from qwen3ft.training import checkpoint
from tasks.adjust import adjust_parameters
from tasks.data import prepare_data
from tasks.environment import check_environment
from tasks.inference import ask_judge, compare_answers, log_inference
from tasks.lora import configure_lora
from tasks.model import prepare_model
from tasks.plan import plan_training
from tasks.policies import RUN_LOGGERS
from tasks.preflight import run_preflight
from tasks.promote import find_champion, promote, register
from tasks.save import save
from tasks.train import finished_attempt, train_attempt

__all__ = ["qwen3_finetune", "run_in_process"]

logger = logs.get_logger("flow")


@flow(
    name="qwen3-finetune",
    flow_run_name=run_name,
    retries=0,
    on_failure=[notify_failure],
    on_crashed=[notify_failure],
)
def qwen3_finetune(
    config: TrainingConfig = TrainingConfig(),  # noqa: B008  frozen, and shown as the run's form
    continue_run: str | None = None,
    nightly: bool = False,
    resumed: int = 0,
) -> State[Any]:
    """Fine-tune, compare and promote; a run with nothing to do ends at once.

    Args:
        config: Settings of the run; those of the deployment hold where none is given.
        continue_run: Id of an earlier run to resume from its folder and checkpoints.
        nightly: Train only on something new, and once a night; scheduled runs always do.
        resumed: Number of automatic resumes after crashes so far.
    """
    survive_closed_pipes()
    for name in RUN_LOGGERS:
        logs.mask_logger(name)
    if continue_run is None:
        config = over_deployment(config)
    else:
        config = settings_to_resume(config, continue_run)
    refuse_second_resume(config, continue_run, resumed)
    cancel_duplicate_resumes(continue_run, resumed)
    nightly = is_nightly(asked=nightly)
    config = for_night(config, nightly=nightly)
    make_folders(config)
    config = named_for_task(config)
    request = find_request(config)
    with (
        logs.without_secrets(),
        workers_ahead() if continue_run else nullcontext(),  # it needs a worker at once
        claim_tonight(config, request, nightly, continue_run) as night,
    ):
        if night.taken is not None:
            return end_as_taken(night, config.model_name)
        if night.run_id not in (continue_run, str(flow_run.id)):
            config = settings_to_finish(config, night.run_id)
        record_run(str(flow_run.id), night.run_id, config)
        with (
            open_run(config, night.run_id, request) as run,
            mirror_to_mlflow(run, config),
            reported(run, config) as reporter,
            commands_about(run),
        ):
            if (since := seen_before(config, request)) is not None:
                return end_without_training(reporter, since, night)
            return fine_tune(config, run, reporter, night)


def fine_tune(
    config: TrainingConfig, run: RunDir, reporter: RunReporter, night: Night
) -> State[Any]:
    """Run all stages."""
    facts = reporter.facts
    with reporter.stage("environment"):
        environment = check_environment(config, str(run.path))
        read_ability_rows(config)  # raises now, not after training, if the rows are unusable
        hosts = JoinedHosts(config, run)
    with hold_devices(config, environment, run) as environment, workers_ahead():
        with reporter.stage("model"):
            model = prepare_model(config, environment, run)
        with reporter.stage("lora"):
            adapter = configure_lora(config, model)
        with reporter.stage("data"):
            facts.champion = or_if_unreachable(find_champion, None, config)
            dataset = prepare_data(config, model, run, find_known_rows(facts.champion))
            change = compare_data(dataset, facts.champion)
            change = explain_training(change, facts.champion, config)
            reporter.show_data(dataset, change)
        if nothing_new(config, change, facts.champion, run):
            return end_without_training(reporter, change.since, night)
        with reporter.stage("plan"):
            first = plan_training(config, environment, model, adapter, dataset)
            warn_of_limits(config, first)
            reporter.show_plan(environment, first)
        with reporter.stage("preflight"):
            planned, first = first, run_preflight(config, environment, first, run)
            if first != planned:
                reporter.show_plan(environment, first)
        with reporter.stage("train"), hosts.joined():
            plan, outcome = train_with_recovery(config, environment, first, reporter, hosts)
            facts.plan, facts.trained = plan, outcome
        with reporter.stage("save"):
            saved = facts.saved = save(config, plan, outcome)
            saved = facts.saved = or_if_unreachable(register, saved, config, saved, str(run.path))
            champion = facts.champion or or_if_unreachable(find_champion, None, config)
            facts.champion = champion
        trained_on = [
            environment.gpus[place].uuid for place in plan.places_on(0) if environment.gpus
        ]
        with reporter.stage("inference"), only_visible(trained_on, environment.gpus):
            report = compare_answers(config, plan, saved, champion)
    if config.judge_url is not None:  # takes minutes, in which another run may use the GPU
        with reporter.stage("judge"):
            report = ask_judge(config, report)
    facts.report = report
    log_inference(run, report)
    with reporter.stage("promote"):
        verdict = facts.verdict = promote(config, saved, report, champion, str(run.path))
    card = reporter.publish()
    night.settle(verdict.decision, champion.version if champion else None)
    send_notice(config, notice_of(config, run, verdict.decision, card))
    return Completed(
        name=card.state_name,
        message=f"{card.verdict} (exact match {card.base_score:.1%} -> "
        f"{card.tuned_score:.1%}, peak {card.peak_memory_gb:.2f} GB)",
    )


def train_with_recovery(
    config: TrainingConfig,
    environment: EnvironmentReport,
    first: TrainPlan,
    reporter: RunReporter,
    hosts: JoinedHosts,
) -> tuple[TrainPlan, AttemptOutcome]:
    """Attempt, adjust, attempt again, until one completes or `adjust` gives up.

    Raises:
        FinetuneError: of the last failure's class; lists what was tried.
    """
    run = reporter.run
    if (outcome := finished_attempt(run, first)) is not None:
        logger.info("training was finished by attempt %d of this run", outcome.attempt)
        return _as_attempt(first, run, outcome.attempt), outcome
    plan = _as_attempt(first, run, run.next_attempt())
    failed: list[FailedAttempt] = []
    while True:
        plan = fit_to_free_memory(config, environment, plan)
        _claim(plan, run)
        try:
            hosts.gather(plan, environment)
        except EnvironmentNotReadyError as error:
            result: object = failure_of_hosts(error, plan, run)
            if not failed or "host" not in error.facts:
                raise
        else:
            with hosts.network(plan):
                state = train_attempt(plan, return_state=True)
            result = state.result(raise_on_failure=False)
        if isinstance(result, BaseException):  # cancelled, or a defect of ours
            raise result
        assert isinstance(result, (AttemptOutcome, Failure))
        reporter.show_attempts()
        if isinstance(result, AttemptOutcome):
            _require_newest(plan, run)
            return plan, result
        failed.append(FailedAttempt(plan, result))
        decision = adjust_parameters(config, failed)
        if isinstance(decision, GiveUp):
            raise decision.failure.to_error()
        plan = decision.plan
        if "max_sequence_length" in decision.change:
            shorter = {"max_sequence_length": plan.max_sequence_length}
            rows = prepare_data(
                config.model_copy(update=shorter), plan.model, run, plan.dataset.known_rows
            )
            plan = plan.model_copy(update={"dataset": rows})


def _claim(plan: TrainPlan, run: RunDir) -> None:
    """Make the folder of an attempt, which another process may have made despite the run's lock.

    Where hosts share the folder, its server gives the lock of one that is cut off to another.
    """
    if not run.attempt(plan.attempt).claim():
        raise _continued_elsewhere(plan, run)


def _require_newest(plan: TrainPlan, run: RunDir) -> None:
    """Refuse to go on with an attempt beside which another process made the next one."""
    if run.attempts()[-1] != run.attempt(plan.attempt):
        raise _continued_elsewhere(plan, run)


def _continued_elsewhere(plan: TrainPlan, run: RunDir) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"Another process has gone on with run {run.path.name} beside attempt {plan.attempt}.",
        why="This host was cut off from the folder meanwhile, and the run was continued elsewhere.",
        next_command="qwen3ft status",
    )


def _as_attempt(plan: TrainPlan, run: RunDir, attempt: int) -> TrainPlan:
    """Return the plan as an attempt of this run, from the newest checkpoint that fits it."""
    folders = [job.checkpoints for job in run.attempts()]
    newest = checkpoint.newest_to_resume(folders, plan)
    resume_from = str(newest.path) if newest else None
    return plan.for_run(run.path.name, str(run.path), attempt=attempt, resume_from=resume_from)


# --- without a server ---


def run_in_process(
    config: TrainingConfig,
    continue_run: str | None = None,
    began: Callable[[str], None] | None = None,
) -> State[Any]:
    """Run the flow in this process, with a temporary server if none is configured.

    Args:
        config: Settings of the run.
        continue_run: Id of an earlier run to resume.
        began: Called with the id of the run when the flow begins.

    Raises:
        EnvironmentNotReadyError: that server did not start.
        CancelledError: Ctrl-C or SIGTERM ended the run.
    """
    try:
        with private_files(), temporary_server():
            run = qwen3_finetune
            if began is not None:
                run = run.with_options(
                    on_running=[lambda _, begun, __: began(continue_run or str(begun.id))]
                )
            return run(config, continue_run, return_state=True)
    except CANCELLED as signal_raised:
        # Only a run that has begun can be resumed.
        notes = getattr(signal_raised, "__notes__", [])
        raise CancelledError(
            "The run was cancelled.",
            why="Ctrl-C or SIGTERM asked its process to end."
            + (" Its checkpoints are kept." if notes else " It had not begun."),
            next_command=notes[0] if notes else "qwen3ft train",
        ) from signal_raised
