"""The context of a run: its folder, journal, GPU lock, and the state it ends in."""

from __future__ import annotations

import os
import re
import select
import shlex
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.naming import run_name
from flows.notify import Event, Notice
from flows.reporting import CANCELLED, RunReporter, page_url
from qwen3ft import logs
from qwen3ft.config import TrainingConfig, checked_name
from qwen3ft.disk.files import make_folder
from qwen3ft.disk.locks import try_lock
from qwen3ft.errors import EnvironmentNotReadyError, FinetuneError, TransientError
from qwen3ft.jobs.failures import folder_gone
from qwen3ft.jobs.folders import RunDir, write_record
from qwen3ft.machine.gpu_choice import choose_gpus, only_visible, rank_count
from qwen3ft.machine.gpu_lock import CPU, hold_gpu, hold_gpus
from qwen3ft.operations.night import Night, NightRequest, read_request, same_settings, write_request
from qwen3ft.records.data import DataChange
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.run_card import RunCard
from qwen3ft.settings import CHANGEABLE_SETTINGS
from qwen3ft.text.commands import with_typed
from qwen3ft.tracking.cursor import read_state
from qwen3ft.tracking.journal import Journal, RunStatus
from qwen3ft.tracking.mirror import Mirror, replay_unsent
from qwen3ft.tracking.uri import default_tracking_uri, run_url
from tasks.policies import hide_known_tracebacks

logger = logs.get_logger("flow")

_NEW_RUN = re.compile(r"qwen3ft (?:run|train)((?: --set \w+=[^\s'\"\\]+)+)")

LOOK_SECONDS = 2.0
"""Longest time that a process holds a run's lock merely to see whether it is running."""

CLOSE_SECONDS, CANCEL_SECONDS = 30.0, 10.0
"""Longest wait at the end of a run, or of a cancelled one, for MLflow to receive the rest."""


@contextmanager
def open_run(config: TrainingConfig, run_id: str, request: NightRequest | None) -> Iterator[RunDir]:
    """Lock the run's folder for this process and start its log; `qwen3ft clean` leaves it alone.

    Nothing in it changes before it is locked. Only its owner can read it.

    Raises:
        EnvironmentNotReadyError: the run is in progress in another process.
        SaveError: the body failed, and the folder is gone.
        ConfigError: `run_id` cannot be the name of a folder.
    """
    run = RunDir(Path(config.runs_dir).resolve() / checked_name(run_id, "run", "qwen3ft status"))
    make_folder(run.path, 0o700)
    with try_lock(run.lock, LOOK_SECONDS) as mine:
        if not mine:
            raise EnvironmentNotReadyError(
                f"Run {run.path.name} is in progress in another process.",
                why="A run can be continued once it has ended; two at once would mix their files.",
                next_command="qwen3ft status",
            )
        logs.configure(console=False, json_path=run.log)
        hide_known_tracebacks()
        write_record(run.config, config)
        if request is not None:
            write_request(run, request)
        try:
            yield run
        except Exception as error:  # of a folder that is gone: whatever was not found first
            if run.lock.exists() or isinstance(error, FinetuneError):
                raise
            raise folder_gone(run.path) from error


@contextmanager
def commands_about(run: RunDir) -> Iterator[None]:
    """Let the next command of an error in the body be about the run's settings.

    A new run with a change that this one may make too is this run resumed, once it has attempts.
    """
    try:
        yield
    except FinetuneError as error:
        changes = _changes_of_new_run(error.next_command)
        if changes and changes.keys() <= CHANGEABLE_SETTINGS.keys() and run.attempts():
            error.next_command = run.command_to_resume(**changes)
        else:
            error.next_command = with_typed(error.next_command, ["--config", str(run.config)])
        raise


def _changes_of_new_run(command: str) -> dict[str, str]:
    """Return what a command that starts a run sets; nothing of any other, or with more options."""
    found = _NEW_RUN.fullmatch(command)
    if found is None:
        return {}
    return dict(word.split("=", 1) for word in shlex.split(found[1])[1::2])


def make_folders(config: TrainingConfig) -> None:
    """Make the folders that a run cannot do without.

    Raises:
        EnvironmentNotReadyError: one of them cannot be made.
    """
    for setting in ("runs_dir", "cache_dir"):
        folder = getattr(config, setting)
        try:
            Path(folder).resolve().mkdir(parents=True, exist_ok=True, mode=0o700)
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            raise EnvironmentNotReadyError(
                f"The folder {folder[:200]!a} cannot be made ({reason}).",
                why=f"It is the setting {setting}; its parent is missing, read-only or no folder.",
                next_command=f"qwen3ft plan --set {setting}=./{setting.removesuffix('_dir')}",
                setting=setting,
            ) from error


@contextmanager
def mirror_to_mlflow(run: RunDir, config: TrainingConfig) -> Iterator[None]:
    """Journal the start and end of the run, and send its journal to MLflow meanwhile."""
    uri = default_tracking_uri()
    journal = Journal(run)
    tags = {
        "prefect.flow_run_id": flow_run.id,
        "prefect.flow_run_url": page_url() or "",
    }
    mirror = Mirror(run, uri)
    mirror.start()
    # in the background, send what an outage kept from MLflow in earlier runs
    backlog = partial(replay_unsent, run.path.parent, uri, current=run)
    threading.Thread(target=backlog, daemon=True).start()
    settings, changed = journal.settings_since_start(config.model_dump(mode="json"))
    if changed:
        tags["changed_settings"] = changed
    journal.run_started(flow_run.name or run_name(), settings, tags)
    status: RunStatus = "FAILED"
    close_seconds = CLOSE_SECONDS
    try:
        yield
        status = "FINISHED"
    except CANCELLED:
        # Whoever cancels a run kills it if it does not end soon.
        status, close_seconds = "KILLED", CANCEL_SECONDS
        raise
    except FinetuneError as error:
        journal.text("failure.txt", str(error))
        raise
    finally:
        journal.run_finished(status)
        if not mirror.close(close_seconds):
            logger.warning("MLflow does not have all of this run yet; send the rest: qwen3ft sync")


@contextmanager
def hold_devices(
    config: TrainingConfig,
    environment: EnvironmentReport,
    run: RunDir,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[EnvironmentReport]:
    """Hold the GPUs of this run, and yield the machine as if it had no others.

    On a CPU runs share the machine unless `lock_cpu` is set.

    Args:
        config: The setting `gpus`, and for how long to wait.
        environment: The machine.
        run: The run, named to those who wait.
        meanwhile: Called again and again while it waits for GPUs; what it raises ends the wait.

    Raises:
        EnvironmentNotReadyError: the GPUs asked for are not there, or other runs hold them.
    """
    when_busy, wait_seconds = config.when_gpu_is_busy, config.wait_for_gpu_seconds
    if not environment.gpus:
        rank_count(config, environment)
        lock = hold_gpu(CPU, run.path.name, when_busy=when_busy, wait_seconds=wait_seconds)
        with lock if config.lock_cpu else nullcontext():
            yield environment
        return
    choice = choose_gpus(config, environment.gpus)
    uuids = [gpu.uuid for gpu in choice.gpus]
    with (
        hold_gpus(
            uuids,
            run.path.name,
            count=choice.count,
            when_busy=when_busy,
            wait_seconds=wait_seconds,
            meanwhile=meanwhile,
        ) as held,
        only_visible(held, environment.gpus),
    ):
        own = tuple(gpu for gpu in choice.gpus if gpu.uuid in held)
        logger.info("on GPU %s", ", ".join(f"{gpu.index} ({gpu.name})" for gpu in own))
        yield environment.model_copy(update={"gpus": own})


def or_if_unreachable(task: Any, otherwise: Any, *arguments: Any) -> Any:
    """Return the task's result, or `otherwise` if the service it needs stayed unreachable."""
    state = task(*arguments, return_state=True)
    result = state.result(raise_on_failure=False)
    if isinstance(result, TransientError):
        logger.warning("%s: %s", task.name, result.what)
        return otherwise
    return state.result()


def warn_of_limits(config: TrainingConfig, plan: TrainPlan) -> None:
    """Log where the machine falls short of what the settings ask for."""
    if plan.max_memory_gb < config.max_memory_gb:
        logger.warning("budget: %s", plan.reasons["max_memory_gb"])
    if plan.device == "cpu" and not config.is_embedded:
        logger.warning("%s %s", config.model_name, plan.reasons["device"])
    if plan.device == "cpu" and plan.memory.kernels == "fused":
        logger.warning("fused kernels: %s", plan.reasons["kernels"])


def nothing_new(
    config: TrainingConfig, change: DataChange, champion: Champion | None, run: RunDir
) -> bool:
    """Return True if the champion has seen all rows, and that is reason not to train.

    Unlike `flows.nightly.seen_before`, which compares files, this also finds rows that only moved.
    """
    if champion is None or change.since is None:
        return False
    if config.new_data == "mix":
        return change.new_rows == 0
    if champion.tags.get("run") == run.path.name:  # killed after its promotion, and resumed
        return False
    again = change.unchanged and same_settings(champion.tags, read_request(run))
    return again and config.when_unchanged == "skip"


def end_without_training(reporter: RunReporter, since: str | None, night: Night) -> State[Any]:
    """Publish the card of a run with nothing to do and return its final state."""
    reporter.facts.nothing_since = since or "the last run"
    card = reporter.publish()
    night.settle("nothing new")
    return Completed(name=card.state_name, message=card.verdict)


def notice_of(config: TrainingConfig, run: RunDir, decision: Event, card: RunCard) -> Notice:
    """Return the notification of the run's outcome."""
    return Notice(
        event=decision,
        run_id=run.path.name,
        model=config.model_name,
        message=card.verdict,
        prefect_url=page_url(),
        mlflow_url=run_url(default_tracking_uri(), read_state(run)),
    )


@cache
def survive_closed_pipes() -> None:
    """Send output to nowhere once its pipe has no reader; set up once per process."""
    pipes = set()
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                pipes.add(descriptor)
    if pipes:
        threading.Thread(target=_watch, args=(pipes,), name="output", daemon=True).start()


def _watch(pipes: set[int]) -> None:
    poll = select.poll()
    for descriptor in pipes:
        poll.register(descriptor, 0)  # errors are reported unasked; nothing else is awaited
    while pipes:
        for descriptor, _ in poll.poll():
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
            poll.unregister(descriptor)
            pipes.remove(descriptor)
