"""The flow `qwen3-finetune-join`: this host's ranks in the attempts of a run on another host.

It looks whether this host can compute the same as the run's own, before anything is trained. Then
it holds its GPUs until the run's training is over, or goes on without this host.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings
from prefect.states import Completed, Failed

from flows.run_context import hold_devices
from qwen3ft import logs
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.digests import code_digest
from qwen3ft.disk.files import PRIVATE_UMASK, is_listed
from qwen3ft.errors import EnvironmentNotReadyError, FinetuneError
from qwen3ft.jobs.folders import JobDir, RunDir, read_record
from qwen3ft.jobs.launcher import try_worker
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.machine.gpus import gpu_use
from qwen3ft.machine.network import interface_for_ranks, listening_on, machine_name
from qwen3ft.operations.run_state import is_running
from qwen3ft.records.machine import EnvironmentReport, GpuUse
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import Failure, RankOutcome
from qwen3ft.recovery.shared_gpu import SETTLE_SECONDS
from qwen3ft.text.commands import shell_line
from qwen3ft.units import size_text

logger = logs.get_logger("join")

LATER_SECONDS = 120.0
"""Time by which a hang ends this host's ranks later than those of the run's own host."""

_POLL_SECONDS = 0.5


@flow(name="qwen3-finetune-join", retries=0)
def qwen3_finetune_join(
    attempt: str, host: int, code: str, gpu: str = "", beside: str = ""
) -> State[Any]:
    """Run this host's ranks of a training; a run with several `hosts` asks for it.

    Args:
        attempt: Folder of the first attempt.
        host: Number of this host in the training.
        code: Digest of the code that the attempt's own host runs.
        gpu: Kind of its GPUs; empty for a CPU.
        beside: `machine_name` of that host.
    """
    logs.configure()
    try:
        _join(JobDir(Path(attempt)), host, code, gpu, beside)
    except FinetuneError as error:
        return Failed(message=str(error))
    return Completed(message=f"Host {host} trained as long as it was needed.")


@logs.without_secrets()
def _join(attempt: JobDir, host: int, code: str, gpu: str, beside: str = "") -> None:
    """Train in all attempts that have this host, from `attempt` on."""
    name = socket.gethostname()
    _require_other_host(beside, name)
    _require_code(code, name)
    run = _require_folder(attempt, name)
    _require_in_progress(attempt, run)
    config = read_record(run.config, TrainingConfig)
    in_progress = partial(_require_in_progress, attempt, run)
    machine = EnvironmentManager().report()
    with (
        hold_devices(config, machine, run, in_progress) as environment,
        listening_on(interface_for_ranks(get_current_settings().api.url or "")),
    ):
        _require_gpus_as(environment, gpu, name)
        following: JobDir | None = attempt
        while following is not None:
            plan = read_record(following.request, TrainPlan)
            if host not in plan.hosts:
                logger.info("attempt %d goes on without this host", plan.attempt)
                return
            _require_room(plan, host, environment, name)
            job = _claim(following, host, name).create(plan)  # the run waits for this
            if _has_begun(following, run):
                train_on_host(job, plan)
            following = _next_attempt(following, run)


def train_on_host(job: JobDir, plan: TrainPlan) -> RankOutcome | Failure:
    """Have a worker train this host's ranks of an attempt; what follows is for the run to decide.

    Args:
        job: The host's folder in the attempt.
        plan: The attempt.
    """
    # Longer than on the run's own host, which sees the ranks of all: it names the one that hangs.
    stall_seconds = plan.stall_seconds + LATER_SECONDS
    result = try_worker("join", job, RankOutcome, stall_seconds=stall_seconds, last=True)
    if isinstance(result, Failure):
        logger.warning("attempt %d ended here: %s", plan.attempt, result.to_error())
    return result


def _next_attempt(attempt: JobDir, run: RunDir) -> JobDir | None:
    """Wait for the attempt after one that has ended here; return None if that was the last.

    Raises:
        EnvironmentNotReadyError: the run has ended without one.
    """
    while not is_listed(attempt.outcome):
        is_newest = run.attempts()[-1:] == [attempt]
        # An attempt that left no failure was killed: another process goes on, and asks for others.
        if not is_running(run) or not (is_newest or is_listed(attempt.failure)):
            raise _over(attempt)
        if not is_newest and is_listed((newest := run.attempts()[-1]).request):
            return newest
        time.sleep(_POLL_SECONDS)
    return None


def _require_other_host(beside: str, name: str) -> None:
    if beside == machine_name():
        raise EnvironmentNotReadyError(
            f"{name} is the run's own host.",
            why="Its Prefect worker takes several runs at once, or did not start this one.",
            next_command="prefect worker start --pool qwen3ft --type process --limit 1",
        )


def _require_code(code: str, name: str) -> None:
    # Before any record is read: those of another version may have other fields.
    if (own := code_digest()) != code:
        raise EnvironmentNotReadyError(
            f"{name} has another version of qwen3ft ({own[:12]}) than the run ({code[:12]}).",
            why="All ranks of a training must compute the same.",
            next_command="qwen3ft doctor",
        )


def _require_folder(attempt: JobDir, name: str) -> RunDir:
    """Return the run of an attempt; refuse if this host lacks something of it."""
    _require_private(attempt, name)
    plan = read_record(attempt.request, TrainPlan)
    run = RunDir(Path(plan.run_dir))
    if attempt != run.attempt(plan.attempt):
        raise EnvironmentNotReadyError(
            f"{attempt.path} is not the folder of attempt {plan.attempt} of {run.path}.",
            why="It was copied or moved, or another than a run asked for this.",
            next_command="qwen3ft status",
        )
    missing = [path for path in (plan.model.path, plan.dataset.path) if not Path(path).exists()]
    if missing:
        raise EnvironmentNotReadyError(
            f"{name} does not see {', '.join(missing)}.",
            why="Hosts that train together share cache_dir too, at the same path.",
            next_command=shell_line("ls", _nearest(Path(missing[0]))),
        )
    return run


def _claim(attempt: JobDir, host: int, name: str) -> JobDir:
    """Return the folder of a host, made for this flow run alone."""
    job = attempt.host(host)
    if not job.claim():
        raise EnvironmentNotReadyError(
            f"Host {host} of {attempt.path} has joined before; {name} is one too many.",
            why="The run asked twice, or this flow run was started again.",
            next_command="qwen3ft status",
        )
    return job


def _require_private(attempt: JobDir, name: str) -> None:
    """Refuse a folder in which another user could put a file: torch loads a pickle from it."""
    try:
        found = attempt.path.lstat()
    except OSError as error:  # also one of another user, that this one may not enter
        raise EnvironmentNotReadyError(
            f"{name} does not see the folder {attempt.path} ({error.strerror}).",
            why="Hosts that train together share the project folder, at the same path, and run as "
            "one user.",
            next_command=shell_line("ls", "-lan", _nearest(attempt.path)),
        ) from error
    if found.st_uid != os.getuid() or found.st_mode & PRIVATE_UMASK or attempt.path.is_symlink():
        raise EnvironmentNotReadyError(
            f"The folder {attempt.path} is not this user's alone ({stat.filemode(found.st_mode)}, "
            f"owner {found.st_uid}).",
            why="Ranks exchange objects through it, which can run any code.",
            next_command=shell_line("ls", "-ldn", attempt.path),
        )


def _nearest(path: Path) -> Path:
    """Return the folder above a missing path, as far as this user sees it."""
    return next(folder for folder in path.parents if os.access(folder, os.F_OK))


def _require_gpus_as(environment: EnvironmentReport, gpu: str, name: str) -> None:
    found = environment.gpus[0].name if environment.gpus else ""
    if found != gpu:
        raise EnvironmentNotReadyError(
            f"{name} has {found or 'no GPU'}, and the run {gpu or 'no GPU'}.",
            why="The ranks of a training wait for the slowest, and share one plan.",
            next_command="qwen3ft doctor",
        )


def _require_room(
    plan: TrainPlan,
    host: int,
    environment: EnvironmentReport,
    name: str,
    *,
    probe: Callable[[str], GpuUse] = gpu_use,
    settle_seconds: float = SETTLE_SECONDS,
) -> None:
    """Refuse if the plan does not fit into what is free now: the run may have waited for a GPU.

    Raises:
        EnvironmentNotReadyError: it does not, or a GPU is gone.
    """
    end = time.monotonic() + settle_seconds
    places = plan.places_on(host) if environment.gpus else ()
    for place in places:
        each = environment.gpus[place % (plan.places_per_host or len(environment.gpus))]
        while (use := probe(each.uuid)).free_bytes < plan.predicted_peak_bytes:
            if time.monotonic() >= end:
                raise EnvironmentNotReadyError(
                    f"GPU {each.index} of {name} has {size_text(use.free_bytes)} free, and the "
                    f"plan needs {size_text(plan.predicted_peak_bytes)}.",
                    why=f"Other programs have the rest: {use.describe()}.",
                    next_command="nvidia-smi",
                )
            time.sleep(_POLL_SECONDS)


def _has_begun(attempt: JobDir, run: RunDir) -> bool:
    """Wait until the attempt has begun on its own host, which waits for all others first.

    Returns:
        False if it never will, as another host refused.
    """
    while not is_listed(attempt.heartbeat):
        if is_listed(attempt.failure):
            return False
        _require_in_progress(attempt, run)
        time.sleep(_POLL_SECONDS)
    return True


def _require_in_progress(attempt: JobDir, run: RunDir) -> None:
    # The lock tells of a run that was killed too, which could not take its request back.
    is_newest = run.attempts()[-1:] == [attempt]
    has_ended = is_listed(attempt.failure) or is_listed(attempt.outcome)
    if has_ended or not is_newest or not is_running(run):
        raise _over(attempt)


def _over(attempt: JobDir) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"The attempt {attempt.path} is over.",
        why="Its run has ended, or makes another attempt.",
        next_command="qwen3ft status",
    )
