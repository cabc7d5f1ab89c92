"""Many runs and many readers at once on one stack: nothing is lost, and the servers stay small.

    python -m benchmarks.load [--runs 200] [--at-once 3] [--clients 20] [--asking-minutes 60]
                              [--minutes 120] [--work DIR] [--out FILE]

Brings up separate servers and a worker in a temporary project folder and lets the deployment run
`--at-once` runs. One run is trained and put into use; then `--runs` are requested at once: one in
ten trains a few steps, the others find nothing new. Meanwhile, and for `--asking-minutes` at least,
`--clients` threads ask both servers every 5 s, as an open page does. Exits with 1 if a run is
lost or does not complete, if MLflow lacks any of it, if a server gave no answer for
`LONGEST_SILENCE_SECONDS`, or if its memory grew by more than `MOST_GROWTH` from the second quarter
of the time to the last.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil
import yaml

from benchmarks.machine import machine as describe_machine
from benchmarks.machine import write_json
from benchmarks.month.stack import ENDED, Clock, Machine, make_project
from deployments import services
from deployments.deploy import CPU_CONFIG
from deployments.processes import MARK, find_marked, start_detached
from deployments.services import POOL, request_json
from qwen3ft.jobs.folders import RunDir
from qwen3ft.records.run_card import COMPLETED_STATES
from qwen3ft.tracking.cursor import outstanding
from qwen3ft.units import MIB

TRAINS_EVERY = 10
LONGEST_SILENCE_SECONDS = 60.0
MOST_GROWTH = 0.25
SAMPLE_SECONDS = 5.0
ASK_EVERY_SECONDS = 5.0
SERVERS = ("prefect", "mlflow")
TINY = {"max_steps": 6, "evaluate_every_steps": 3, "max_rows": 96, "inference_rows": 24}


@dataclass
class Answers:
    """Times of the answers of one server, added to by all clients."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    last: float = field(default_factory=time.monotonic)
    longest_silence_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, started: float, *, answered: bool) -> None:
        """Add one request that was made at `started`."""
        now = time.monotonic()
        with self.lock:
            if not answered:
                self.failed += 1
                return
            self.seconds.append(now - started)
            self.note_silence(now)

    def note_silence(self, now: float) -> None:
        """Count the time from the last answer until `now`."""
        self.longest_silence_seconds = max(self.longest_silence_seconds, now - self.last)
        self.last = now

    def summary(self) -> dict[str, float]:
        """Return counts, and the median and 99th percentile in seconds."""
        cuts = quantiles(self.seconds, n=100) if len(self.seconds) > 1 else [0.0] * 99
        return {
            "answers": len(self.seconds),
            "failed": self.failed,
            "median_seconds": round(cuts[49], 3),
            "p99_seconds": round(cuts[98], 3),
            "longest_silence_seconds": round(self.longest_silence_seconds, 1),
        }


class Load:
    """One stack with its clients.

    Args:
        root: An empty folder.
        at_once: Runs that the deployment lets run at the same time.
    """

    def __init__(self, root: Path, at_once: int) -> None:
        self.root, self.at_once = root, at_once
        self.stack = make_project(root, {"when_unchanged": "skip", "output_dir": "out"})
        deployment = root / "deployments" / "prefect.yaml"
        text = deployment.read_text(encoding="utf-8")
        deployment.write_text(text.replace("limit: 1\n", f"limit: {at_once}\n"), encoding="utf-8")
        self.machine, self.clock = Machine(self.stack), Clock(self.stack)
        self.answers = {name: Answers() for name in SERVERS}
        self.memory_mib: dict[str, list[float]] = {name: [] for name in SERVERS}
        self._ended = threading.Event()

    def open(self) -> None:
        """Bring the stack up and put a first run's adapter into use."""
        self.machine.boot()
        self.machine.wait_until_up()
        self._add_worker()
        done = self.machine.command("deploy")
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        first = self.clock.run({"config": self.config()})
        if self.wait([first], 1800.0).get(first) not in COMPLETED_STATES:
            sys.exit(f"the first run did not complete; see {self.root / 'runs' / first}")

    def _add_worker(self) -> None:
        """Start a second worker, as the stack's own takes one run at a time."""
        layout = self.stack.layout()
        options = f"worker start --pool {POOL} --type process --limit {self.at_once} --name load"
        start_detached(
            [sys.executable, "-m", "deployments.prefect_worker", *options.split()],
            environment=services.environment(layout) | {MARK: str(self.root)},
            folder=self.root,
            log=self.root / "load-worker.log",
        )

    def config(self, **changes: Any) -> dict[str, Any]:
        """Return the settings of a run; without changes it finds nothing new."""
        found: dict[str, Any] = yaml.safe_load((self.root / CPU_CONFIG).read_text("utf-8"))
        return {**found, **changes}

    def request(self, runs: int) -> list[str]:
        """Request all runs at once; return their ids."""
        requested = []
        for number in range(runs):
            trains = number % TRAINS_EVERY == 0
            changes = {**TINY, "name": f"load-{number}"} if trains else {}
            requested.append(self.clock.run({"config": self.config(**changes)}))
        return requested

    def ask_meanwhile(self, clients: int) -> list[threading.Thread]:
        """Start the clients and the reader of the servers' memory."""
        for answers in self.answers.values():
            answers.last = time.monotonic()
        work = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]
        work.append(threading.Thread(target=self._sample, daemon=True))
        for thread in work:
            thread.start()
        return work

    def wait(self, runs: Sequence[str], seconds: float) -> dict[str, str]:
        """Wait until all runs have ended, or `seconds` are over; return the state of each."""
        states: dict[str, str] = {}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.machine.look()
            for run_id in runs:
                if run_id in states:
                    continue
                found = self._json(f"{self._api()}/flow_runs/{run_id}")
                if found is None or found["state_type"] not in ENDED:
                    break  # they run in the order in which they were requested
                states[run_id] = found["state_name"]
            if len(states) == len(runs):
                break
            time.sleep(1.0)
        return states

    def close(self) -> None:
        """End the clients and every process."""
        self._ended.set()
        self.machine.shut_down()

    def _json(self, address: str, body: dict[str, Any] | None = None) -> Any:
        return request_json(self.stack.layout().secret, address, body)

    def _api(self) -> str:
        return f"{self.stack.layout().url('prefect')}/api"

    def _ask(self) -> None:
        mlflow = f"{self.stack.layout().url('mlflow')}/api/2.0/mlflow/runs/search"
        questions = {
            "prefect": (f"{self._api()}/flow_runs/filter", {"limit": 50}),
            "mlflow": (mlflow, {"experiment_ids": ["0", "1"], "max_results": 50}),
        }
        while not self._ended.wait(ASK_EVERY_SECONDS):
            for name, (address, body) in questions.items():
                started = time.monotonic()
                answer = self._json(address, body)
                self.answers[name].add(started, answered=answer is not None)

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            for name in SERVERS:
                used_bytes = 0
                for process in find_marked(self.root, name):
                    try:
                        used_bytes += process.memory_info().rss
                    except psutil.Error:
                        continue
                self.memory_mib[name].append(used_bytes / MIB)


def growth(samples: Sequence[float]) -> float:
    """Return the growth from the second quarter's highest sample to the last quarter's."""
    quarter = len(samples) // 4
    if not quarter:
        return 0.0
    return max(samples[-quarter:]) / max(samples[quarter : 2 * quarter]) - 1


def judge(load: Load, requested: Sequence[str], states: dict[str, str]) -> dict[str, Any]:
    """Return counts and everything that is not as it must be."""
    problems = [f"run {run} did not end" for run in requested if run not in states]
    for run, state in states.items():
        if state not in COMPLETED_STATES:
            problems.append(f"run {run} ended as {state}")
        elif unsent := outstanding(RunDir(load.root / "runs" / run)):
            problems.append(f"MLflow lacks {unsent} entries of run {run}")
    locked = {}
    for name in SERVERS:
        answers, grown = load.answers[name], growth(load.memory_mib[name])
        answers.note_silence(time.monotonic())  # one that died gives no answer that ends it
        if answers.longest_silence_seconds > LONGEST_SILENCE_SECONDS:
            silence = answers.longest_silence_seconds
            problems.append(f"{name} gave no answer for {silence:.0f} s")
        if grown > MOST_GROWTH:
            problems.append(f"{name}'s memory grew by {grown:.0%}")
        log = load.stack.layout().log(name).read_text(encoding="utf-8", errors="replace")
        locked[name] = log.count("database is locked")
    return {
        "requested": len(requested),
        "states": dict(Counter(states.values())),
        "answers": {name: load.answers[name].summary() for name in SERVERS},
        "highest_mib": {name: round(max(load.memory_mib[name], default=0.0)) for name in SERVERS},
        "growth": {name: round(growth(load.memory_mib[name]), 3) for name in SERVERS},
        "lines_database_is_locked": locked,
        "problems": problems,
        "passed": not problems,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; return 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--asking-minutes", type=float, default=60.0, help="least time to ask for")
    parser.add_argument("--minutes", type=float, default=120.0, help="time for all runs to end")
    parser.add_argument("--work", type=Path, help="folder to keep")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    root = (asked.work or Path(tempfile.mkdtemp(prefix="qwen3ft-load-"))).resolve()
    root.mkdir(parents=True, exist_ok=True)
    load = Load(root, asked.at_once)
    started = time.monotonic()
    try:
        load.open()
        load.ask_meanwhile(asked.clients)
        asking = time.monotonic()
        requested = load.request(asked.runs)
        states = load.wait(requested, 60 * asked.minutes)
        time.sleep(max(0.0, asking + 60 * asked.asking_minutes - time.monotonic()))
        summary = {"machine": describe_machine(), **judge(load, requested, states)}
    finally:
        load.close()
    summary["seconds"] = round(time.monotonic() - started, 1)
    for name, value in summary.items():
        print(f"{name}: {value}")
    if asked.out:
        write_json(asked.out, summary)
    if asked.work is None and summary["passed"]:
        shutil.rmtree(root, ignore_errors=True)
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
