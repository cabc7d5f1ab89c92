"""The flow `qwen3-finetune-join`: this host's ranks in one attempt of a run on another host.

It looks whether this host can compute the same as the run's own, before anything is trained.
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
from qwen3ft.digests import code_digest
from qwen3ft.errors import EnvironmentNotReadyError, FinetuneError
from qwen3ft.files import PRIVATE_UMASK
from qwen3ft.jobs.folders import JobDir, RunDir, read_record
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.machine.environment import EnvironmentManager
from qwen3ft.machine.gpus import gpu_use
from qwen3ft.machine.network import interface_for_ranks, machine_name
from qwen3ft.operations.run_state import is_running
from qwen3ft.records.machine import EnvironmentReport, GpuUse
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import RankOutcome
from qwen3ft.recovery.shared_gpu import SETTLE_SECONDS
from qwen3ft.text.commands import shell_line
from qwen3ft.units import size_text

logger = logs.get_logger("join")

_POLL_SECONDS = 0.5


@flow(name="qwen3-finetune-join", retries=0)
def qwen3_finetune_join(
    attempt: str, host: int, code: str, gpu: str = "", beside: str = ""
) -> State[Any]:
    """Run this host's ranks of a training attempt; a run with several `hosts` asks for it.

    Args:
        attempt: Folder of the attempt.
        host: Number of this host in the attempt.
        code: Digest of the code that the attempt's own host runs.
        gpu: Kind of its GPUs; empty for a CPU.
        beside: `machine_name` of that host.
    """
    logs.configure()
    try:
        _join(JobDir(Path(attempt)), host, code, gpu, beside)
    except FinetuneError as error:
        return Failed(message=str(error))
    return Completed(message=f"Host {host} trained to the end.")


def _join(attempt: JobDir, host: int, code: str, gpu: str, beside: str = "") -> None:
    name = socket.gethostname()
    if beside == machine_name():
        raise EnvironmentNotReadyError(
            f"{name} is the run's own host.",
            why="Its Prefect worker takes several runs at once, and would wait for its own GPUs.",
            next_command="prefect worker start --pool qwen3ft --type process --limit 1",
        )
    if not attempt.request.is_file():
        raise EnvironmentNotReadyError(
            f"{name} does not see the folder {attempt.path}.",
            why="Hosts that train together share the project folder, at the same path.",
            next_command=shell_line("ls", _nearest(attempt.path)),
        )
    _require_private(attempt)
    plan = read_record(attempt.request, TrainPlan)
    run = RunDir(Path(plan.run_dir))
    if attempt != run.attempt(plan.attempt):
        raise EnvironmentNotReadyError(
            f"{attempt.path} is not the folder of attempt {plan.attempt} of {run.path}.",
            why="It was copied or moved, or another than a run asked for this.",
            next_command="qwen3ft status",
        )
    _require_in_progress(attempt, run)
    missing = [path for path in (plan.model.path, plan.dataset.path) if not Path(path).exists()]
    if missing:
        raise EnvironmentNotReadyError(
            f"{name} does not see {', '.join(missing)}.",
            why="Hosts that train together share cache_dir too, at the same path.",
            next_command=shell_line("ls", _nearest(Path(missing[0]))),
        )
    if (own := code_digest()) != code:
        raise EnvironmentNotReadyError(
            f"{name} has another version of qwen3ft ({own[:12]}) than the run ({code[:12]}).",
            why="All ranks of a training must compute the same.",
            next_command="qwen3ft doctor",
        )
    config = read_record(run.config, TrainingConfig)
    in_progress = partial(_require_in_progress, attempt, run)
    machine = EnvironmentManager().report()
    with (
        hold_devices(config, machine, run, in_progress) as environment,
        interface_for_ranks(get_current_settings().api.url or ""),
    ):
        _require_gpus_as(environment, gpu, name)
        _require_room(plan, environment, name)
        job = _claim(attempt, host, name).create(plan)  # the run waits for this
        _wait_for_start(attempt, run)
        run_worker("join", job, RankOutcome, stall_seconds=plan.stall_seconds, last=True)


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


def _require_private(attempt: JobDir) -> None:
    """Refuse a folder in which another user could put a file: torch loads a pickle from it."""
    found = attempt.path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & PRIVATE_UMASK or attempt.path.is_symlink():
        raise EnvironmentNotReadyError(
            f"The folder {attempt.path} is not this user's alone ({stat.filemode(found.st_mode)}, "
            f"owner {found.st_uid}).",
            why="Ranks exchange objects through it, which can run any code.",
            next_command=shell_line("ls", "-ldn", attempt.path),
        )


def _nearest(path: Path) -> Path:
    """Return the folder above a missing path, as far as it is there."""
    return next(folder for folder in path.parents if folder.is_dir())


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
    environment: EnvironmentReport,
    name: str,
    *,
    probe: Callable[[str], GpuUse] = gpu_use,
    settle_seconds: float = SETTLE_SECONDS,
) -> None:
    """Refuse if the plan does not fit into what is free now: the run may have waited for a GPU."""
    end = time.monotonic() + settle_seconds
    for each in environment.gpus:
        while (use := probe(each.uuid)).free_bytes < plan.predicted_peak_bytes:
            if time.monotonic() >= end:
                raise EnvironmentNotReadyError(
                    f"GPU {each.index} of {name} has {size_text(use.free_bytes)} free, and the "
                    f"plan needs {size_text(plan.predicted_peak_bytes)}.",
                    why=f"Other programs have the rest: {use.describe()}.",
                    next_command="nvidia-smi",
                )
            time.sleep(_POLL_SECONDS)


def _wait_for_start(attempt: JobDir, run: RunDir) -> None:
    """Wait until the attempt has begun on its own host, which waits for all others first."""
    while not attempt.heartbeat.exists():
        _require_in_progress(attempt, run)
        time.sleep(_POLL_SECONDS)


def _require_in_progress(attempt: JobDir, run: RunDir) -> None:
    # The lock tells of a run that was killed too, which could not take its request back.
    is_newest = run.attempts()[-1:] == [attempt]
    if attempt.failure.exists() or attempt.outcome.exists() or not is_newest or not is_running(run):
        raise EnvironmentNotReadyError(
            f"The attempt {attempt.path} is over.",
            why="Its run has ended, or makes another attempt.",
            next_command="qwen3ft status",
        )
