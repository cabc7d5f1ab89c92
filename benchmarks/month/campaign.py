"""A simulated month: night after night on a real stack, with bad data and faults drawn by a seed.

    python -m benchmarks.month.campaign [--nights 30] [--seed 0] [--steps 3600]
                                        [--least-share 0.95] [--work DIR] [--out FILE]

In a temporary project folder `qwen3ft up --stay` keeps a Prefect server, an MLflow server and a
worker up, as under systemd. The deployment's nights start one after another as its schedule starts
them, each with its own date, and train the embedded model on the CPU on the files of the simulated
data source (nights.py). Meanwhile processes are killed, servers hang, the disk is full, the power
fails (faults.py). This command only starts nights and acts as systemd; anything else that it has to
do counts as a manual intervention.

After every night (checks.py) the registry has one more promotion if one was due and none otherwise,
no run's adapter is registered twice, the champion loads with plain PEFT and answers, every row is
accounted for, and the night ended as expected. Exits with 1 if one of these fails, after a manual
intervention, if a bad night was promoted, or if less than `--least-share` of the time was useful
(report.py). The cost of a fault does not depend on the length of a training: with `--steps 300` the
month takes half an hour instead of two, and a larger share is lost. `--out` is written after every
night.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gate.nights import clean_rows, write_rows
from benchmarks.machine import machine as describe_machine
from benchmarks.machine import write_json
from benchmarks.month.checks import MODEL, Checker, Outcome, RegistryState, check_night
from benchmarks.month.faults import Fault, Scene, make_faults
from benchmarks.month.nights import (
    MACHINE_OFF,
    MOST_NIGHTS,
    Night,
    Source,
    plan_month,
    products_of,
)
from benchmarks.month.report import (
    LEAST_SHARE,
    NightResult,
    head,
    line_of,
    passed,
    print_summary,
    summarise,
    trained_seconds,
)
from benchmarks.month.stack import ENDED, Clock, Machine, make_project
from deployments import services
from qwen3ft.jobs.folders import RunDir

MOST_STEPS = 3600
"""Steps of each training, about five minutes; a tenth is enough for a quick look."""
MOST_NIGHT_SECONDS = 1800.0
"""Time limit of a night, which takes about six minutes; past it somebody must intervene."""
POLL_SECONDS = 0.2
ASK_SECONDS = 1.0
"""Seconds between two requests to Prefect."""

SETTINGS: dict[str, Any] = {
    "data_paths": ["data"],
    "name": MODEL,
    "output_dir": "out",
    "fallback_output_dirs": ["out-2"],
    "num_epochs": 1000,  # max_steps ends the training
    "learning_rate": 6.0e-4,  # a fifth of the default, for ten times the steps
    "evaluate_every_steps": 60,
    "early_stopping_patience": 1000,
    "max_memory_gb": 4.0,
}


class Month:
    """One month on one machine.

    Args:
        root: An empty folder.
        nights: The planned nights.
        seed: Seed of the data.
        steps: Steps of each training.
    """

    def __init__(self, root: Path, nights: list[Night], seed: int, steps: int) -> None:
        self.nights = nights
        self.steps = steps
        products = products_of(nights)
        dev, self.test = (root / "held-out" / f"{split}.jsonl" for split in ("dev", "test"))
        self.test.parent.mkdir()
        write_rows(self.test, clean_rows("test", products))
        held_out = {"dev_paths": [str(dev)], "test_paths": [str(self.test)]}
        self.stack = make_project(root, {**SETTINGS, **held_out, "max_steps": steps})
        self.machine = Machine(self.stack)
        self.clock = Clock(self.stack)
        self.source = Source(root / "data", dev, products, seed)
        self._checker: Checker | None = None
        self._registry = RegistryState()
        self._overdue: Night | None = None
        self._overdue_folders: list[Path] = []
        self._faults: list[Fault] = []

    def open(self) -> None:
        """Install the project, once, before the first night."""
        self.machine.boot()
        self.machine.wait_until_up()
        done = self.machine.command("deploy")
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        os.environ.update(services.access(self.stack.layout()))  # for the checker's client
        self._checker = Checker(self.stack.layout().url("mlflow"), self.test)

    def close(self) -> None:
        """End every process and remove every mount."""
        for fault in self._faults:
            fault.end()
        if self._checker is not None:
            self._checker.close()
        self.machine.shut_down()

    def run(self, night: Night) -> NightResult:
        """Run one night with its faults and check the invariants after it."""
        assert self._checker is not None
        self.source.write(night)
        result = NightResult(night.number, night.date, night.kind, list(night.faults), [])
        result.catches_up = night.catches_up
        if night.undone == MACHINE_OFF:
            self.machine.shut_down()
            result.struck.append("machine off")
            outcome, after = Outcome([], []), self._registry
        else:
            outcome = self._pass(night, result)
            after = self._checker.read_registry()
            result.champion_right, problems = self._checker.check_champion(after)
            result.problems += problems + self._checker.check_rows(outcome, self.source.totals())
        result.problems += check_night(night, self._overdue, self._registry, after, outcome)
        result.states = [str(run["state_name"]) for run in outcome.runs]
        result.verdict, result.champion = outcome.verdict, after.champion
        result.message = str(((outcome.worked or {}).get("state") or {}).get("message") or "")[:400]
        result.attempts = sum(len(RunDir(folder).attempts()) for folder in outcome.folders)
        new = [folder for folder in outcome.folders if folder not in self._overdue_folders]
        result.trained_seconds = sum(trained_seconds(folder) for folder in new)
        self._registry, self._overdue = after, night if night.undone else None
        self._overdue_folders = new if night.undone else []
        return result

    def _pass(self, night: Night, result: NightResult) -> Outcome:
        """Start the night as often as planned, and wait for its end."""
        if self._overdue is not None and self._overdue.undone == MACHINE_OFF:
            self.machine.boot()
            self.machine.wait_until_up()
        known_runs = {run["id"] for run in self.clock.runs() or []}
        scene = self._scene()
        self._faults = make_faults(night.strikes, night.undone, scene)
        for fault in self._faults:
            fault.begin()
        began = time.monotonic()
        planted = ",".join(filter(None, (fault.plan() for fault in self._faults)))
        self.clock.start(night.hour, planted)
        if self._overdue is not None and self._overdue.undone == MACHINE_OFF:
            self.clock.start(self._overdue.hour)  # it is due too once the machine is back
        if "double start" in night.faults:
            self.clock.start(night.hour)
        runs = self._wait(known_runs, result)
        if "second start" in night.faults:
            self.clock.start(night.hour)
            runs = self._wait(known_runs, result)
        result.total_seconds = time.monotonic() - began
        for fault in self._faults:
            fault.end()
            if not fault.effects or (fault.planted and not scene.was_tried_again()):
                result.problems.append(f"{fault.name} did not strike")
            result.struck.append(f"{fault.name}: {', '.join(fault.effects)}")
        result.struck += [name for name in night.faults if name.endswith("start")]
        self._faults = []
        self.machine.wait_until_up()
        return Outcome(runs, scene.folders() + self._overdue_folders)

    def _scene(self) -> Scene:
        runs = self.stack.root / "runs"
        known = frozenset(path.name for path in runs.iterdir()) if runs.is_dir() else frozenset()
        return Scene(self.machine, self.stack.root / "out", known, self.steps)

    def _wait(self, known: set[str], result: NightResult) -> list[dict[str, Any]]:
        """Wait until no run of the night is in progress or due to resume; return its flow runs."""
        end, looked = time.monotonic() + MOST_NIGHT_SECONDS, 0.0
        runs: list[dict[str, Any]] = []
        while time.monotonic() < end:
            self.machine.look()
            for fault in self._faults:
                fault.look()
            if time.monotonic() - looked >= ASK_SECONDS:
                looked = time.monotonic()
                found = self.clock.runs()
                if found is not None:
                    runs = [run for run in found if run["id"] not in known]
                    if runs and _is_over(runs):
                        return runs
            time.sleep(POLL_SECONDS)
        result.interventions.append(
            f"night {result.number} did not end: {[run['state_name'] for run in runs]}"
        )
        self.machine.command("down")
        self.machine.shut_down()
        self.machine.boot()
        self.machine.wait_until_up()
        return runs


def _is_over(runs: list[dict[str, Any]]) -> bool:
    """Return whether all runs have ended and each crashed one was resumed."""
    if any(run["state_type"] not in ENDED for run in runs):
        return False
    crashed = [run for run in runs if run["state_type"] == "CRASHED"]
    resumed = [run for run in runs if run["parameters"].get("resumed")]
    return len(resumed) >= len(crashed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the month; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=MOST_STEPS, help="steps of each training")
    parser.add_argument(
        "--least-share", type=float, default=LEAST_SHARE, help="bar for the share of useful time"
    )
    parser.add_argument("--work", type=Path, help="folder to keep")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    if not 1 <= asked.nights <= MOST_NIGHTS:
        parser.error(f"--nights must be 1 to {MOST_NIGHTS}: the embedded data has no more products")
    signal.signal(signal.SIGTERM, _interrupt)
    root = (asked.work or Path(tempfile.mkdtemp(prefix="qwen3ft-month-"))).resolve()
    root.mkdir(parents=True, exist_ok=True)
    nights = plan_month(asked.nights, asked.seed)
    try:
        results, summary = live(root, nights, asked)
    finally:
        if asked.work is None:
            shutil.rmtree(root, ignore_errors=True)
    print_summary(summary, results)
    return 0 if passed(summary) else 1


def live(
    root: Path, nights: list[Night], asked: argparse.Namespace
) -> tuple[list[NightResult], dict[str, Any]]:
    """Run all nights until interrupted; print and save each as it ends."""
    month, results = Month(root, nights, asked.seed, asked.steps), list[NightResult]()
    summary: dict[str, Any] = {}
    started = time.monotonic()
    try:
        month.open()
        print(head(), flush=True)
        for night in nights:
            results.append(month.run(night))
            print(line_of(results[-1]), flush=True)
            summary = {
                "machine": describe_machine(),
                "load_average": [round(load, 1) for load in os.getloadavg()],
                "seed": asked.seed,
                "steps": asked.steps,
                "seconds": round(time.monotonic() - started, 1),
                "restarts_by_the_unit": month.machine.restarts,
                **summarise(results, len(nights), asked.least_share),
            }
            summary["passed"] = passed(summary)
            if asked.out:
                write_json(asked.out, summary)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        month.close()
    return results, summary or summarise(results, len(nights), asked.least_share)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
