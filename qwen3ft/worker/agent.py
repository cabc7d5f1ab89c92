"""The worker of a job with several ranks: it starts torch's elastic agent and watches over it.

The agent (`torch.distributed.elastic`, what `torchrun` runs) starts one process for each rank, ends
all of them when one fails, and restarts none: recovery plans the next attempt. To the launcher this
is a worker as any other. Its heartbeat is that of all ranks together; its failure is that of the
rank that failed first. On several hosts each has such a worker for its own ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qwen3ft.errors import FinetuneError, PreemptedError
from qwen3ft.jobs.folders import JobDir, read_record
from qwen3ft.jobs.launcher import (
    RecordRelay,
    beat_time,
    kernel_oom_kills,
    last_sign,
    unrecorded_failure,
)
from qwen3ft.jobs.processes import GRACE_SECONDS, PARENT_VARIABLE
from qwen3ft.logs import get_logger
from qwen3ft.records.evaluation import InferenceReport
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.records.training import AttemptOutcome, Failure, RankOutcome
from qwen3ft.units import GIB
from qwen3ft.worker.hosts import FIRST_SIGN_SECONDS, Agent, OtherHosts, is_consequence

if TYPE_CHECKING:
    from qwen3ft.worker.jobs import Job

logger = get_logger("ranks")

LOOK_AT_RANKS_SECONDS = 0.5
"""Time between two looks at the heartbeats of the ranks."""

RANK_END_SECONDS = GRACE_SECONDS - 1
"""Time from SIGTERM to SIGKILL of ranks that another one's end leaves behind."""

_FOR_EVER = 1_000_000
"""Intervals of 5 s for which torch's rendezvous believes that a silent agent is there."""

RANK, ANSWERING_RANK = "rank", "answering-rank"
"""Kinds of processes that are one of the ranks of a training, or of an inference test."""


def train_ranks(job: Job) -> AttemptOutcome:
    """Run one training attempt on several ranks; the outcome has the peaks of all."""
    folders = _run_training(job, job.dir, 0)
    outcome, others = read_record(folders[0].outcome, AttemptOutcome), _outcomes(folders[1:])
    peaks = (outcome.peak_memory_gb, *(other.peak_memory_gb for other in others))
    changes: dict[str, Any] = {"rank_peaks_gb": peaks, "peak_memory_gb": max(peaks)}
    for name in ("exchange_ms", "computing_ms", "launch_bound_share"):
        own = getattr(outcome, f"rank_{name}")
        changes[f"rank_{name}"] = (*own, *(getattr(other, name) for other in others))
    return outcome.model_copy(update=changes)


def join_ranks(job: Job) -> RankOutcome:
    """Run the ranks of a further host, in a folder of its own below the attempt's."""
    host = int(job.dir.path.name)
    plan = read_record(job.dir.request, TrainPlan)
    folders = _run_training(job, JobDir(job.dir.path.parents[1]), host)
    own = _outcomes([folders[rank] for rank in plan.ranks_on(host)])
    return max(own, key=lambda outcome: outcome.peak_memory_gb)


def _run_training(job: Job, attempt: JobDir, host: int) -> list[JobDir]:
    """Run one host's ranks of an attempt; return the folders of all ranks."""
    plan = read_record(job.dir.request, TrainPlan)
    agent = Agent(attempt, host, {each: plan.ranks_on(each) for each in plan.hosts})
    return _run_ranks(job, plan, RANK, f"{plan.run_id or 'run'}-{plan.attempt}", agent)


def ask_ranks(job: Job) -> InferenceReport:
    """Run the inference test on several ranks; the report has the highest peak of all."""
    request = read_record(job.dir.request, InferenceRequest)
    agent = Agent(job.dir, 0, {0: range(request.ranks)})
    folders = _run_ranks(job, request, ANSWERING_RANK, "inference", agent)
    report = read_record(folders[0].outcome, InferenceReport)
    others = [int(other.peak_memory_gb * GIB) for other in _outcomes(folders[1:])]
    return report.model_copy(update={"peak_bytes": max([report.peak_bytes or 0, *others])})


def _outcomes(folders: Sequence[JobDir]) -> list[RankOutcome]:
    """Return the outcomes of ranks above 0."""
    return [read_record(folder.outcome, RankOutcome) for folder in folders]


def _run_ranks(
    job: Job, request: TrainPlan | InferenceRequest, kind: str, run_id: str, agent: Agent
) -> list[JobDir]:
    """Run a process of this kind for each of the agent's ranks until all ranks have ended.

    Returns:
        The folders of all ranks.

    Raises:
        FinetuneError: the failure of the rank that failed first, as far as this host knows.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    whole, own = agent.job, agent.ranks[agent.host]
    folders = [whole.rank(rank) for rank in range(request.ranks)]
    for rank in own:
        folders[rank].create(request)
    job.heartbeat.beat("start")
    threads = max(1, _own_threads() // len(own))
    os.environ.update({"OMP_NUM_THREADS": str(threads), PARENT_VARIABLE: str(os.getpid())})
    kills_before = kernel_oom_kills()
    _shorten_shutdown()
    launch = elastic_launch(_launch_config(agent, run_id), sys.executable)
    others = OtherHosts(agent)
    # On the run's own host the silence of any rank is a stall, which names it.
    followed = folders if agent.host == 0 else [folders[rank] for rank in own]
    try:
        with _followed(job, followed, others) as ended:
            launch("-m", "qwen3ft.worker", kind, str(whole.path))
    except (SignalException, PreemptedError) as stopped:
        if ended:  # by this process, for another host
            job.is_broken_off = False
            codes = {rank: 1 for rank in own if folders[rank].failure.exists()}
            raise first_failure(folders, codes, kills_before, lambda: ended) from None
        if isinstance(stopped, PreemptedError):
            raise
        raise _stopped(job, stopped.sigval) from None
    except ChildFailedError as failed:
        codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        try:
            first = first_failure(folders, codes, kills_before, others.last_words)
        except SignalException as stopped:  # torch's handler, while this waits for other hosts
            first = _stopped(job, stopped.sigval)
        raise first from None
    return folders


def _stopped(job: Job, number: int) -> PreemptedError:
    job.stop.signal_name = signal.Signals(number).name
    return job.stop.error()


def _own_threads() -> int:
    """Return the threads that OpenMP gives this process: of "8,2" the 8, 2 are of nested loops."""
    outermost = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(outermost) if outermost.isdigit() else 1


def first_failure(
    folders: Sequence[JobDir],
    codes: Mapping[int, int],
    kills_before: int = 0,
    elsewhere: Callable[[], Sequence[Failure]] = tuple,
) -> FinetuneError:
    """Return the failure that ended the others.

    Args:
        folders: Folders of the ranks.
        codes: Exit statuses of the ranks that failed on this host, in the order in which the agent
            saw them.
        kills_before: `kernel_oom_kills` before the ranks started.
        elsewhere: Returns the failures of other hosts; asked only if the cause is not here.
    """
    failures = [
        _of_rank(
            rank,
            len(folders),
            folders[rank].read_failure()
            or Failure.from_error(unrecorded_failure(folders[rank], code, kills_before)),
        )
        for rank, code in codes.items()
    ]
    if all(map(is_consequence, failures)):
        failures += elsewhere()
    # Of equals the one that the agent saw first; but who is gone counts before who was left.
    return min(
        failures, key=lambda each: (is_consequence(each), "lost_host" not in each.facts)
    ).to_error()


def _of_rank(rank: int, ranks: int, failure: Failure) -> Failure:
    facts = {**failure.facts, "rank": rank, "ranks": ranks}
    what = f"Rank {rank} of {ranks}: {failure.what}"
    return failure.model_copy(update={"what": what, "facts": facts})


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


def _launch_config(agent: Agent, run_id: str) -> Any:
    """Return the settings of torch's agent: the hosts that share the job, and no restart."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    # Otherwise the agent opens a port on all interfaces, for a store that no rank uses.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return LaunchConfig(
        min_nodes=len(agent.ranks),
        max_nodes=len(agent.ranks),
        nproc_per_node=len(agent.ranks[agent.host]),
        logs_specs=DefaultLogsSpecs(log_dir=str(agent.job.meeting_place.with_name("agent"))),
        run_id=run_id,
        rdzv_backend="c10d",
        # A file of this user instead of a port that the whole network could reach.
        rdzv_endpoint=str(agent.job.meeting_place.with_name("rendezvous")),
        rdzv_configs={
            "store_type": "file",
            "join_timeout": int(2 * FIRST_SIGN_SECONDS),
            # Torch compares the clocks of hosts; who is gone is known without them.
            "keep_alive_max_attempt": _FOR_EVER,
        },
        # Agents are numbered in the order of these names, and ranks in the order of agents. Nobody
        # looks them up: ranks meet through the folder.
        local_addr=f"host-{agent.host:04d}",
        max_restarts=0,
        monitor_interval=0.1,
    )


@contextmanager
def _followed(
    job: Job, folders: Sequence[JobDir], others: OtherHosts
) -> Iterator[Sequence[Failure]]:
    """Beat for the job whenever a rank has beaten: when one hangs, all are silent soon.

    Log records of rank 0 and warnings of the others are repeated meanwhile. When another host has
    ended, this process is asked to stop; the list that is yielded then says why.
    """
    over = threading.Event()
    follower = _Follower(job, folders, others)

    def follow() -> None:
        is_over, problem = False, ""
        while not is_over:
            is_over = over.wait(LOOK_AT_RANKS_SECONDS)
            try:
                follower.look(is_over=is_over)
            except OSError as error:  # of a full disk, say: without this thread all seem to hang
                if problem != (problem := str(error)):
                    logger.warning("cannot follow the ranks: %s", error)

    thread = threading.Thread(target=follow, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield follower.ended
    finally:
        over.set()
        thread.join()


class _Follower:
    """Memory between two looks at the ranks and at the other hosts.

    Attributes:
        ended: Why other hosts have ended, once that is why this process was asked to stop.
    """

    def __init__(self, job: Job, folders: Sequence[JobDir], others: OtherHosts) -> None:
        self.ended: list[Failure] = []
        self._job, self._folders, self._others = job, folders, others
        self._logs = [RecordRelay(folder, f"rank {folder.path.name}: ") for folder in folders]
        if folders[0].path.name == "0":
            self._logs[0] = RecordRelay(folders[0])
        self._beats: list[int] = []
        self._parted_at = 0.0

    def look(self, *, is_over: bool) -> None:
        """Look once; after the end of the ranks (`is_over`) nothing is stopped.

        Raises:
            OSError: a file could not be read or written.
        """
        failures = self._others.failures()  # first: it also shows that this host is there
        beats = [beat_time(folder) for folder in self._folders]
        if beats != self._beats or self._others.are_awaited:
            self._beats = beats
            self._job.heartbeat.beat(*last_sign(self._folders[0]))
        if failures and not self.ended and not is_over:
            self._parted_at = self._parted_at or time.monotonic()
            # Who only lost the others says nothing new: the cause may be here, on its way.
            causes = self._others.causes(failures)
            if not all(map(is_consequence, causes)) or (
                time.monotonic() - self._parted_at > GRACE_SECONDS + LOOK_AT_RANKS_SECONDS
            ):
                self.ended.extend(causes or failures)
                os.kill(os.getpid(), signal.SIGTERM)
        for log in self._logs:
            log.relay()
