"""Interrupts trainings at random and aimed moments, and compares every end with an undisturbed one.

    python -m benchmarks.kills.campaign [--interruptions 1000] [--stack 50] [--minutes 120]
                                        [--jobs 1] [--seed 0] [--work DIR] [--out FILE]

Trainings of the embedded model on the CPU, padded, packed, fused and with offloading, are killed,
asked to stop once and twice, stopped and left stopped until they count as stalled, run into a full
disk, lose their power (what was not synced is gone), and are interrupted at each point of the code
at which something is committed. Each is resumed as the flow resumes it, up to a dozen times. In the
end the adapter, the optimizer's and the generators' state, the best step and its loss and all
metrics by step must be those of an undisturbed training, bit by bit. `--jobs` processes share the
trainings, each with a seed of its own. `--stack` of the interruptions strike whole runs of the flow
with their servers (stack.py).

Exits with 1 if one is not, if a worker is stuck, if a committed checkpoint is lost, if the end of
one is not classified, or if there were fewer interruptions than asked for.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from random import Random
from types import FrameType
from typing import TYPE_CHECKING, Any

from benchmarks.kills.strikes import KINDS, MOST_SECONDS, Blow, draw, suffer
from benchmarks.kills.trainings import (
    PATHS,
    SCHEDULE,
    Nursery,
    Result,
    make_plan,
    newest_step,
    next_attempt,
    read_result,
    train_undisturbed,
)
from benchmarks.machine import machine as describe_machine
from benchmarks.machine import write_json
from qwen3ft import logs
from qwen3ft.jobs.folders import RunDir
from qwen3ft.records.plan import TrainPlan

if TYPE_CHECKING:
    from benchmarks.kills.stack import StackCampaign

MOST_IN_ONE_RUN = 12
"""Most interruptions of one training."""


TRAINING_SHARE = 0.5
"""Share of an undisturbed attempt's time that is training; the rest is loading."""


@dataclass
class Reference:
    """The undisturbed training of one path."""

    plan: TrainPlan
    result: Result
    seconds: float


@dataclass
class Campaign:
    """Counts of a campaign so far."""

    seed: int
    runs: int = 0
    identical: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    """Interruptions by kind."""
    phases: Counter[str] = field(default_factory=Counter)
    """Interruptions by the phase that the worker was in."""
    endings: Counter[str] = field(default_factory=Counter)
    """Ends of interrupted attempts by the kind of their failure."""
    by_path: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def interruptions(self) -> int:
        """Number of interruptions so far."""
        return self.struck.total()

    def add(self, other: Campaign) -> None:
        """Add the counts of a campaign with another seed."""
        self.runs, self.identical = self.runs + other.runs, self.identical + other.identical
        for mine, theirs in (
            (self.struck, other.struck),
            (self.phases, other.phases),
            (self.endings, other.endings),
            (self.by_path, other.by_path),
        ):
            mine.update(theirs)
        self.problems += [f"seed {other.seed}, {problem}" for problem in other.problems]

    def count(self, path: str, blow: Blow) -> None:
        """Add one attempt."""
        self.problems += [f"{path}: {problem} ({blow.strike})" for problem in blow.problems]
        if blow.struck:
            self.struck[blow.strike.kind] += 1
            self.phases[blow.phase] += 1
            self.endings[blow.ended_as] += 1
            self.by_path[path] += 1

    def compare(self, path: str, run: RunDir, reference: Result) -> None:
        """Add the end of one run; one that differs keeps its folder."""
        self.runs += 1
        differences = read_result(run).differences(reference)
        if differences:
            self.problems.append(f"{path}: {run.path.name} differs: {'; '.join(differences)}")
            return
        self.identical += 1
        shutil.rmtree(run.path)


def interrupt(
    nursery: Nursery, campaign: Campaign, path: str, run: RunDir, reference: Reference, most: int
) -> None:
    """Train one run to its end, with `most` interruptions on the way."""
    random = Random(f"{campaign.seed} {run.path.name}")
    remaining = most
    while True:
        plan = next_attempt(reference.plan, run)
        run.attempt(plan.attempt).create(plan)
        if remaining > 0:
            done = newest_step(run) / plan.total_steps
            strike = draw(random, reference.seconds * (1 - TRAINING_SHARE * done))
            blow = suffer(nursery, run, plan.attempt, strike)
            campaign.count(path, blow)
            remaining -= blow.struck
        else:
            nursery.start(run.attempt(plan.attempt).path)
            status = nursery.wait(MOST_SECONDS)
            blow = None
            if status != 0:
                campaign.problems.append(f"{path}: undisturbed attempt ended with {status}")
                return
        if blow is None or blow.completed:
            campaign.compare(path, run, reference.result)
            return


def run_campaign(
    work: Path,
    interruptions: int,
    seconds: float,
    seed: int,
    paths: Sequence[str] = tuple(PATHS),
    report: Any = print,
) -> Campaign:
    """Interrupt trainings until there were enough interruptions or the time is over."""
    campaign, end = Campaign(seed), time.monotonic() + seconds
    with Nursery() as nursery:
        references: dict[str, Reference] = {}
        for path in paths:
            plan = make_plan(work, path)
            run = RunDir(work / "runs" / f"undisturbed-{len(references)}")
            references[path] = Reference(plan, *train_undisturbed(nursery, plan, run))
        random = Random(seed)
        while campaign.interruptions < interruptions and time.monotonic() < end:
            path = paths[campaign.runs % len(paths)]
            run = RunDir(work / "runs" / f"run-{campaign.runs:04d}")
            most = min(random.randint(1, MOST_IN_ONE_RUN), interruptions - campaign.interruptions)
            interrupt(nursery, campaign, path, run, references[path], most)
            if campaign.problems or campaign.runs % 10 == 0:
                report(
                    f"seed {seed}: {campaign.interruptions} interruptions, {campaign.identical} of "
                    f"{campaign.runs} runs identical, {len(campaign.problems)} problems",
                    flush=True,
                )
    return campaign


def run_campaigns(work: Path, interruptions: int, seconds: float, seed: int, jobs: int) -> Campaign:
    """Share the interruptions among `jobs` processes; their seeds follow `seed`."""
    if jobs == 1:
        return run_campaign(work, interruptions, seconds, seed)
    campaign, share = Campaign(seed), -(-interruptions // jobs)
    # Spawned: torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = [
            pool.submit(run_campaign, work / f"seed-{own}", share, seconds, own)
            for own in range(seed, seed + jobs)
        ]
        for one in running:
            campaign.add(one.result())
    return campaign


def summarise(
    campaign: Campaign, stack: StackCampaign | None, wanted: int, seconds: float
) -> dict[str, Any]:
    """Return the result as JSON values."""
    on_stack = {
        "interruptions": len(stack.struck) if stack else 0,
        "runs": stack.runs if stack else 0,
        "identical": stack.identical if stack else 0,
        "by_kind": dict(Counter(stack.struck).most_common()) if stack else {},
    }
    problems = campaign.problems + (stack.problems if stack else [])
    interruptions = campaign.interruptions + on_stack["interruptions"]
    runs, identical = campaign.runs + on_stack["runs"], campaign.identical + on_stack["identical"]
    return {
        "machine": describe_machine(),
        "seed": campaign.seed,
        "schedule": SCHEDULE,
        "seconds": round(seconds, 1),
        "interruptions": interruptions,
        "wanted_interruptions": wanted,
        "runs": runs,
        "identical": identical,
        "by_kind": {kind: campaign.struck[kind] for kind in KINDS},
        "by_phase": dict(campaign.phases.most_common()),
        "by_path": {path: campaign.by_path[path] for path in PATHS},
        "ended_as": dict(campaign.endings.most_common()),
        "on_a_stack": on_stack,
        "problems": problems,
        "passed": not problems and identical == runs and interruptions >= wanted,
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Print the table, with date and machine."""
    machine = summary["machine"]
    print(f"\n{machine['date']}, {machine['cpu_count']} CPU cores ({machine['cpu']})")
    print(f"{summary['interruptions']} interruptions in {summary['seconds']:.0f} s; ", end="")
    print(f"{summary['identical']} of {summary['runs']} runs ended bit-identical")
    for title in ("by_kind", "by_phase", "by_path", "ended_as"):
        print(f"\n{title.replace('_', ' ')}")
        for name, count in summary[title].items():
            print(f"  {count:5d}  {name}")
    print("\non a stack")
    for name, count in summary["on_a_stack"]["by_kind"].items():
        print(f"  {count:5d}  {name}")
    for problem in summary["problems"]:
        print(f"PROBLEM  {problem}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; return 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interruptions", type=int, default=1000)
    parser.add_argument("--stack", type=int, default=50, help="interruptions of whole runs")
    parser.add_argument("--minutes", type=float, default=120.0, help="end after this time")
    parser.add_argument("--jobs", type=int, default=1, help="trainings interrupted at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder to keep")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    logs.configure(console=False)
    work = (asked.work or Path(tempfile.mkdtemp(prefix="qwen3ft-kills-"))).resolve()
    started = time.monotonic()
    alone, end = asked.interruptions - asked.stack, started + 60 * asked.minutes
    campaign = run_campaigns(work, alone, end - time.monotonic(), asked.seed, asked.jobs)
    stack = None
    if asked.stack:
        from benchmarks.kills.stack import StackCampaign  # needs what servers need

        stack = StackCampaign(work / "stack", asked.seed)
        stack.run(asked.stack, end)
    summary = summarise(campaign, stack, asked.interruptions, time.monotonic() - started)
    print_summary(summary)
    if asked.out:
        write_json(asked.out, summary)
    if asked.work is None and summary["passed"]:
        shutil.rmtree(work, ignore_errors=True)
    return 0 if summary["passed"] else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
