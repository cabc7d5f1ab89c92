"""The worker of a job with several ranks: it starts torch's elastic agent and watches over it.

The agent (`torch.distributed.elastic`, what `torchrun` runs) starts one process for each rank, ends
all of them when one fails, and restarts none: recovery plans the next attempt. To the launcher this
is a worker as any other. Its heartbeat is that of all ranks together; its failure is that of the
rank that failed first.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qwen3ft.errors import FinetuneError
from qwen3ft.jobs.folders import JobDir, read_record
from qwen3ft.jobs.launcher import RecordRelay, kernel_oom_kills, last_sign, unrecorded_failure
from qwen3ft.jobs.processes import GRACE_SECONDS, PARENT_VARIABLE
from qwen3ft.logs import get_logger
from qwen3ft.records.evaluation import InferenceReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.records.training import AttemptOutcome, Failure, RankOutcome
from qwen3ft.units import GIB

if TYPE_CHECKING:
    from qwen3ft.worker.jobs import Job

logger = get_logger("ranks")

LOOK_AT_RANKS_SECONDS = 0.5
"""Time between two looks at the heartbeats of the ranks."""

RANK_END_SECONDS = GRACE_SECONDS - 1
"""Time from SIGTERM to SIGKILL of ranks that another one's end leaves behind."""

CONSEQUENCES = ("PreemptedError", "RanksPartedError")
"""Failures that another rank's end causes; `DistBackendError` is NCCL's own word for it."""


RANK, ANSWERING_RANK = "rank", "answering-rank"
"""Kinds of processes that are one of the ranks of a training, or of an inference test."""


def train_ranks(job: Job) -> AttemptOutcome:
    """Run one training attempt on several ranks; the outcome has the peaks of all."""
    plan = read_record(job.dir.request, TrainPlan)
    folders = _run_ranks(job, plan, RANK, f"{plan.run_id or 'run'}-{plan.attempt}")
    outcome, others = read_record(folders[0].outcome, AttemptOutcome), _others(folders)
    peaks = (outcome.peak_memory_gb, *(other.peak_memory_gb for other in others))
    times = (*outcome.rank_exchange_ms, *(other.exchange_ms for other in others))
    changes = {"rank_peaks_gb": peaks, "rank_exchange_ms": times, "peak_memory_gb": max(peaks)}
    return outcome.model_copy(update=changes)


def ask_ranks(job: Job) -> InferenceReport:
    """Run the inference test on several ranks; the report has the highest peak of all."""
    request = read_record(job.dir.request, InferenceRequest)
    folders = _run_ranks(job, request, ANSWERING_RANK, "inference")
    report = read_record(folders[0].outcome, InferenceReport)
    others = [int(other.peak_memory_gb * GIB) for other in _others(folders)]
    return report.model_copy(update={"peak_bytes": max([report.peak_bytes or 0, *others])})


def _others(folders: Sequence[JobDir]) -> list[RankOutcome]:
    """Return what the ranks above 0 have left."""
    return [read_record(folder.outcome, RankOutcome) for folder in folders[1:]]


def _run_ranks(
    job: Job, request: TrainPlan | InferenceRequest, kind: str, run_id: str
) -> list[JobDir]:
    """Run a process of this kind for each rank to its end; return their folders.

    Raises:
        FinetuneError: the failure of the rank that failed first.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    shutil.rmtree(job.dir.meeting_place.parent, ignore_errors=True)  # of ranks before these
    folders = [job.dir.rank(rank).create(request) for rank in range(request.ranks)]
    job.heartbeat.beat("start")
    threads = max(1, int(os.environ.get("OMP_NUM_THREADS", "1")) // request.ranks)
    os.environ.update({"OMP_NUM_THREADS": str(threads), PARENT_VARIABLE: str(os.getpid())})
    kills_before = kernel_oom_kills()
    _shorten_shutdown()
    launch = elastic_launch(_launch_config(job.dir, request.ranks, run_id), sys.executable)
    try:
        with _followed(job, folders):
            launch("-m", "qwen3ft.worker", kind, str(job.dir.path))
    except SignalException as stopped:
        job.stop.signal_name = signal.Signals(stopped.sigval).name
        raise job.stop.error() from None
    except ChildFailedError as ended:
        codes = {rank: failure.exitcode for rank, failure in ended.failures.items()}
        raise first_failure(folders, codes, kills_before) from None
    return folders


def first_failure(
    folders: Sequence[JobDir], codes: Mapping[int, int], kills_before: int = 0
) -> FinetuneError:
    """Return the failure that ended the others.

    Args:
        folders: Folders of the ranks.
        codes: Exit statuses of the ranks that failed, in the order in which the agent saw them.
        kills_before: `kernel_oom_kills` before the ranks started.
    """
    failures = {
        rank: folders[rank].read_failure()
        or Failure.from_error(unrecorded_failure(folders[rank], codes[rank], kills_before))
        for rank in codes
    }
    # of equals the one that the agent saw first
    rank, failure = min(failures.items(), key=lambda item: _is_consequence(item[1]))
    facts = {**failure.facts, "rank": rank, "ranks": len(folders)}
    what = f"Rank {rank} of {len(folders)}: {failure.what}"
    return failure.model_copy(update={"what": what, "facts": facts}).to_error()


def _is_consequence(failure: Failure) -> bool:
    return failure.kind in CONSEQUENCES or failure.facts.get("error_type") == "DistBackendError"


def _shorten_shutdown() -> None:
    """Have the agent kill ranks `RANK_END_SECONDS` after it asked them to end; torch waits 30 s.

    A rank that waits for a lost one in a kernel of NCCL runs no handler of Python's. Torch has no
    setting for it.
    """
    from torch.distributed.elastic.multiprocessing.api import PContext

    close = PContext.close

    def close_soon(context: Any, death_sig: Any = None, timeout: float = RANK_END_SECONDS) -> None:
        close(context, death_sig, int(min(timeout, RANK_END_SECONDS)))

    PContext.close = close_soon  # type: ignore[method-assign, assignment]


def _launch_config(job: JobDir, ranks: int, run_id: str) -> Any:
    """Return the agent's settings: this host alone, and no restart."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    # Otherwise the agent opens a port on all interfaces, for a store that no rank uses.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        logs_specs=DefaultLogsSpecs(log_dir=str(job.meeting_place.with_name("agent"))),
        run_id=run_id,
        rdzv_backend="c10d",
        # A file of this user instead of a port that the whole network could reach.
        rdzv_endpoint=str(job.meeting_place.with_name("rendezvous")),
        rdzv_configs={"store_type": "file", "timeout": 60},
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )


@contextmanager
def _followed(job: Job, folders: Sequence[JobDir]) -> Iterator[None]:
    """Beat for the job whenever a rank has beaten: when one hangs, all are silent soon.

    Log records of rank 0 and warnings of the others are repeated meanwhile.
    """
    over = threading.Event()

    logs = [RecordRelay(folder, f"rank {rank}: ") for rank, folder in enumerate(folders)]
    logs[0] = RecordRelay(folders[0])

    def follow() -> None:
        before: list[int] = []
        is_over = False
        while not is_over:
            is_over = over.wait(LOOK_AT_RANKS_SECONDS)
            for log in logs:
                log.relay()
            beats = [
                folder.heartbeat.stat().st_mtime_ns if folder.heartbeat.exists() else 0
                for folder in folders
            ]
            if beats != before:
                before = beats
                job.heartbeat.beat(*last_sign(folders[0]))

    thread = threading.Thread(target=follow, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
