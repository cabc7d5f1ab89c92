"""Kills a random rank at a random moment, again and again, and compares every end bit by bit.

    python -m benchmarks.kills.ranks [--kills 50] [--ranks 2 3] [--jobs 1] [--minutes 60]
                                     [--seed 0] [--work DIR] [--out FILE]

Trainings of the embedded model on the CPU, packed with dropout and fused, on several ranks. Each is
started as the flow starts an attempt; one of its ranks is killed (SIGKILL), and the run goes on
from its newest checkpoint, up to four times. In the end the adapter, the optimizer's state, the
best step and its loss and all metrics must be those of an undisturbed training on as many ranks,
bit by bit. `--jobs` runs are on the way at a time, each with a core for each rank and one more.

Exits with 1 if one is not, if an attempt took longer than 10 s to end after the kill, if its
failure is not that of the killed rank, if a process is left, or if there were fewer kills than
asked for.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

from benchmarks.kills.trainings import (
    SCHEDULE,
    Result,
    make_plan,
    next_attempt,
    read_result,
)
from benchmarks.machine import machine as describe_machine
from benchmarks.machine import write_json
from qwen3ft import logs
from qwen3ft.jobs.folders import JobDir, RunDir
from qwen3ft.jobs.launcher import last_sign, try_worker
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure

PATHS = ("packed, dropout", "fused")
MOST_KILLS_OF_A_RUN = 4
LOADING_SHARE = 0.25
"""Share of kills at any moment of an attempt; the others come while it trains."""

MOST_END_SECONDS = 10.0
STALL_SECONDS = 300.0


@dataclass
class RankCampaign:
    """Counts of a campaign so far."""

    kills: int = 0
    runs: int = 0
    identical: int = 0
    by_ranks: Counter[int] = field(default_factory=Counter)
    by_phase: Counter[str] = field(default_factory=Counter)
    end_seconds: list[float] = field(default_factory=list)
    """Time from each kill to the end of its attempt."""
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Killer(threading.Thread):
    """Thread that kills one rank of an attempt at a moment."""

    def __init__(self, job: JobDir, rank: int, after_seconds: float, *, in_training: bool) -> None:
        super().__init__(daemon=True)
        self.job, self.rank = job, rank
        self.after_seconds, self.in_training = after_seconds, in_training
        self.over = threading.Event()
        self.killed_at: float | None = None
        self.phase = ""

    def run(self) -> None:
        """Wait for the moment and kill, unless the attempt is over before."""
        while self.in_training and last_sign(self.job.rank(self.rank))[0] not in (
            "train",
            "evaluate",
        ):
            if self.over.wait(0.05):
                return
        if self.over.wait(self.after_seconds):
            return
        while (process := find_rank(self.job, self.rank)) is None:
            if self.over.wait(0.05):
                return
        self.phase = last_sign(self.job.rank(self.rank))[0]
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
            self.killed_at = time.monotonic()


def find_rank(job: JobDir, rank: int) -> psutil.Process | None:
    """Return the process of a rank; None before it has made itself one."""
    for process in processes_of(job):
        with suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank) and "rank" in process.cmdline():
                return process
    return None


def processes_of(job: JobDir) -> list[psutil.Process]:
    """Return the processes that were started with the folder of the attempt."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if str(job.path) in (process.info["cmdline"] or ())]


def run_attempt(plan: TrainPlan, run: RunDir) -> tuple[JobDir, AttemptOutcome | Failure]:
    """Run one attempt as the flow does."""
    job = run.attempt(plan.attempt)
    return job, try_worker("ranks", job, AttemptOutcome, stall_seconds=STALL_SECONDS)


def kill_once(
    campaign: RankCampaign, random: Random, plan: TrainPlan, run: RunDir, train_seconds: float
) -> tuple[bool, bool]:
    """Run an attempt and kill one of its ranks; return whether it completed, and was killed."""
    job = run.attempt(plan.attempt).create(plan)
    rank, in_training = random.randrange(plan.ranks), random.random() >= LOADING_SHARE
    moment = random.uniform(0, train_seconds if in_training else 2 * train_seconds)
    killer = Killer(job, rank, moment, in_training=in_training)
    killer.start()
    _, result = run_attempt(plan, run)
    ended = time.monotonic()
    killer.over.set()
    killer.join()
    if left := processes_of(job):
        campaign.problems.append(f"{run.path.name}: {len(left)} processes are left")
    if killer.killed_at is None:
        return isinstance(result, AttemptOutcome), False
    seconds = ended - killer.killed_at
    with campaign.lock:
        campaign.kills += 1
        campaign.by_ranks[plan.ranks] += 1
        campaign.by_phase[killer.phase] += 1
        campaign.end_seconds.append(seconds)
    if isinstance(result, AttemptOutcome):  # killed when it had nothing left to do
        campaign.problems.append(f"{run.path.name}: completed without rank {rank}")
        return True, True
    if seconds > MOST_END_SECONDS:
        campaign.problems.append(f"{run.path.name}: ended {seconds:.1f} s later")
    if (result.kind, result.facts.get("rank")) != ("WorkerCrashedError", rank):
        campaign.problems.append(f"{run.path.name}: rank {rank} killed, but: {result.what}")
    return False, True


def train_to_the_end(
    campaign: RankCampaign,
    random: Random,
    plan: TrainPlan,
    run: RunDir,
    reference: tuple[Result, float],
    most: int,
) -> None:
    """Train one run, kill up to `most` times on the way, and compare its end."""
    expected, train_seconds = reference
    kills = 0
    while True:
        attempt = next_attempt(plan, run)
        if kills < most:
            completed, was_killed = kill_once(campaign, random, attempt, run, train_seconds)
            kills += was_killed
        else:
            run.attempt(attempt.attempt).create(attempt)
            _, result = run_attempt(attempt, run)
            completed = isinstance(result, AttemptOutcome)
            if isinstance(result, Failure):
                campaign.problems.append(f"{run.path.name}: undisturbed, but: {result.what}")
                return
        if completed:
            break
    with campaign.lock:
        campaign.runs += 1
    if differences := read_result(run).differences(expected):
        campaign.problems.append(f"{run.path.name} differs: {'; '.join(differences)}")
        return
    with campaign.lock:
        campaign.identical += 1
    shutil.rmtree(run.path)


def undisturbed(plan: TrainPlan, run: RunDir) -> tuple[Result, float]:
    """Train to the end; return the result and the time from the first step to the last."""
    attempt = next_attempt(plan, run)
    run.attempt(1).create(attempt)
    _, result = run_attempt(attempt, run)
    if isinstance(result, Failure):
        raise result.to_error()
    return read_result(run), result.seconds


def run_rank_campaign(
    work: Path, kills: int, ranks: Sequence[int], seconds: float, seed: int, jobs: int = 1
) -> RankCampaign:
    """Kill ranks until there were enough kills or the time is over."""
    campaign, end = RankCampaign(), time.monotonic() + seconds
    cases = [(path, size) for size in ranks for path in PATHS]
    plans = [make_plan(work, path).with_settings(places=tuple(range(size))) for path, size in cases]
    runs = [RunDir(work / "runs" / f"undisturbed-{number}") for number in range(len(cases))]
    numbers = itertools.count()

    def train() -> None:
        while campaign.kills < kills and time.monotonic() < end:
            number = next(numbers)
            random = Random(f"{seed}-{number}")  # of a run alone, whatever runs beside it
            case, most = number % len(cases), random.randint(1, MOST_KILLS_OF_A_RUN)
            run = RunDir(work / "runs" / f"run-{number:04d}")
            train_to_the_end(campaign, random, plans[case], run, references[case], most)
            with campaign.lock:
                print(
                    f"{campaign.kills} kills, {campaign.identical} of {campaign.runs} runs "
                    f"identical, {len(campaign.problems)} problems",
                    flush=True,
                )

    # A worker dies with the thread that started it: those of the pool stay until all is over.
    with ThreadPoolExecutor(jobs) as pool:
        references = list(pool.map(undisturbed, plans, runs))
        for job in [pool.submit(train) for _ in range(jobs)]:
            job.result()
    return campaign


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; return 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=60.0, help="end after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder to keep")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    logs.configure(console=False)
    os.environ["OMP_NUM_THREADS"] = "1"
    work = (asked.work or Path(tempfile.mkdtemp(prefix="qwen3ft-ranks-"))).resolve()
    started = time.monotonic()
    campaign = run_rank_campaign(
        work, asked.kills, asked.ranks, 60 * asked.minutes, asked.seed, asked.jobs
    )
    ends = sorted(campaign.end_seconds) or [0.0]
    summary = {
        "machine": describe_machine(),
        "seed": asked.seed,
        "jobs": asked.jobs,
        "schedule": SCHEDULE,
        "seconds": round(time.monotonic() - started, 1),
        "kills": campaign.kills,
        "wanted_kills": asked.kills,
        "runs": campaign.runs,
        "identical": campaign.identical,
        "by_ranks": dict(campaign.by_ranks),
        "by_phase": dict(campaign.by_phase.most_common()),
        "seconds_from_kill_to_end": {
            "median": round(ends[len(ends) // 2], 2),
            "most": round(ends[-1], 2),
        },
        "problems": campaign.problems,
        "passed": not campaign.problems
        and campaign.identical == campaign.runs
        and campaign.kills >= asked.kills,
    }
    machine: Any = summary["machine"]
    print(f"\n{machine['date']}, {machine['cpu_count']} CPU cores ({machine['cpu']})")
    for name, value in summary.items():
        if name != "machine":
            print(f"  {name.replace('_', ' '):26}{value}")
    if asked.out:
        write_json(asked.out, summary)
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
