"""Whole runs of the flow on a real stack, whose processes are struck at random moments.

The flow's process, its training worker, Prefect's worker and server, MLflow's server or all of them
at once are killed, asked to stop, or stopped for a while; `qwen3ft up --stay` restarts servers, the
automation of the deployment resumes a crashed run once, and after that this campaign resumes it as
a person does. The adapter, the scores and all metrics must be those of an undisturbed run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import yaml

from benchmarks.kills.trainings import SCHEDULE
from benchmarks.month.faults import Scene
from benchmarks.month.stack import ENDED, Clock, Machine, kill, make_project, pause, resume
from deployments.processes import find_marked
from qwen3ft.disk.files import sha256_file
from qwen3ft.disk.manifests import find_damage
from qwen3ft.jobs.folders import RunDir
from qwen3ft.report.attempts import read_run_metrics

VICTIMS: dict[str, Callable[[Scene], list[psutil.Process]]] = {
    "training worker": Scene.trainings,
    "flow": Scene.flows,
    "Prefect's worker": Scene.workers,
    "Prefect's server": lambda scene: find_marked(scene.root, "prefect"),
    "MLflow's server": lambda scene: find_marked(scene.root, "mlflow"),
}
EVERYTHING = "everything"
BLOWS = ("killed", "asked to stop", "stopped for a while")
MOST_PAUSE_SECONDS = 5.0
MOST_SECONDS = 1800.0
"""Longest time of one run with all its continuations; past it the run is stuck."""
RESUMED_WITHIN_SECONDS = 45.0
"""Time after a crash in which the automation may start the run again."""
POLL_SECONDS = 0.5
SETTINGS: dict[str, Any] = {
    "lora_dropout": 0.1,
    "packing": "on",
    "batch_size": 16,
    "gradient_accumulation_steps": 1,
    "max_rows": 96,
    "inference_rows": 24,
    "max_memory_gb": 4.0,
    "max_steps": SCHEDULE["total_steps"],
    "evaluate_every_steps": SCHEDULE["evaluate_every_steps"],
    "output_dir": "out",
}
"""Settings of every run; those of a GPU are in the trainings without a stack."""


@dataclass
class StackRun:
    """One run of the flow: the results that must not depend on what struck it."""

    adapter: str
    scores: tuple[Any, ...]
    losses: tuple[Any, ...]

    def differences(self, other: StackRun) -> list[str]:
        """Name what differs."""
        return [name for name in vars(self) if getattr(self, name) != getattr(other, name)]


@dataclass
class StackCampaign:
    """A stack of its own and what was done to it.

    Args:
        root: An empty folder.
        seed: Seed of victims and moments.
    """

    root: Path
    seed: int
    struck: list[str] = field(default_factory=list)
    runs: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        stack = make_project(self.root, SETTINGS)
        self.machine, self.clock = Machine(stack), Clock(stack)
        self._random = Random(self.seed)
        self._whole_seconds = MOST_SECONDS  # the shortest run so far

    def run(self, interruptions: int, until: float) -> None:
        """Strike runs until there were enough interruptions or the time `until` has come."""
        try:
            self.machine.boot()
            self.machine.wait_until_up()
            done = self.machine.command("deploy")
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            undisturbed = self._live(0)
            assert undisturbed is not None, self.problems
            while len(self.struck) < interruptions and time.monotonic() < until:
                most = min(self._random.randint(1, 4), interruptions - len(self.struck))
                found = self._live(most)
                self.runs += 1
                if found is None:
                    continue
                if different := found.differences(undisturbed):
                    self.problems.append(f"stack run {self.runs}: {', '.join(different)} differ")
                else:
                    self.identical += 1
        finally:
            self.machine.shut_down()

    def _live(self, strikes: int) -> StackRun | None:
        """Run the flow to its end with `strikes` interruptions; None if it is stuck."""
        known = frozenset(path.name for path in (self.root / "runs").glob("*"))
        scene = Scene(self.machine, self.root / "out", known, SETTINGS["max_steps"])
        name = f"kills-{self.runs}-{len(self.struck)}"  # no champion: every run is compared alike
        settings = {**self._settings(), "name": name}
        run_id = self.clock.run({"config": settings})
        started = time.monotonic()
        due, end = self._next_moment(), started + MOST_SECONDS
        silent_since: float | None = None
        while time.monotonic() < end:
            self.machine.look()
            if strikes and time.monotonic() >= due:
                strikes -= self._strike(scene)
                due = self._next_moment()
            runs = self._runs_of(run_id)
            if runs and any(run["state_type"] == "COMPLETED" for run in runs):
                self._whole_seconds = min(self._whole_seconds, time.monotonic() - started)
                return self._result(run_id)
            ended = bool(runs) and all(run["state_type"] in ENDED for run in runs)
            silent_since = (silent_since or time.monotonic()) if ended else None
            if silent_since and time.monotonic() - silent_since > RESUMED_WITHIN_SECONDS:
                if RunDir(self.root / "runs" / run_id).config.exists():
                    self.clock.run({"config": settings, "continue_run": run_id})
                else:  # a run that was struck before it began is not taken up
                    run_id = self.clock.run({"config": settings})
                silent_since = None
            time.sleep(POLL_SECONDS)
        states = [run["state_name"] for run in self._runs_of(run_id)]
        self.problems.append(f"run {run_id} is stuck after {MOST_SECONDS:.0f} s: {states}")
        return None

    def _settings(self) -> dict[str, Any]:
        config = self.root / "deployments" / "configs" / "embedded.yaml"
        found: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
        return found

    def _next_moment(self) -> float:
        return time.monotonic() + self._random.uniform(0.0, self._whole_seconds)

    def _strike(self, scene: Scene) -> bool:
        """Strike one victim; False if there is none at the moment."""
        victim, blow = self._random.choice([*VICTIMS, EVERYTHING]), self._random.choice(BLOWS)
        if victim == EVERYTHING:
            self.machine.lose_power()
            self.struck.append(f"{EVERYTHING} killed")
            return True
        processes = VICTIMS[victim](scene)
        if not processes:
            return False
        if blow == "killed":
            kill(processes)
        elif blow == "asked to stop":
            for process in processes:
                try:
                    process.terminate()
                except psutil.NoSuchProcess:
                    continue
        else:
            pause(processes)
            time.sleep(self._random.uniform(0.0, MOST_PAUSE_SECONDS))
            resume(processes)
        self.struck.append(f"{victim} {blow}")
        return True

    def _runs_of(self, run_id: str) -> list[dict[str, Any]]:
        """Return the flow runs that worked on a run; none while the server does not answer."""
        return [
            run
            for run in self.clock.runs() or []
            if run_id in (run["id"], run["parameters"].get("continue_run"))
        ]

    def _result(self, run_id: str) -> StackRun:
        run = RunDir(self.root / "runs" / run_id)
        card = json.loads((run.path / "card.json").read_text(encoding="utf-8"))
        adapter = Path(card["adapter_path"])
        adapter = adapter if adapter.is_absolute() else self.root / adapter
        if damage := find_damage(adapter):
            self.problems.append(f"run {run_id}: {damage}")
        names = ("base_score", "tuned_score", "held_out_loss_before", "held_out_loss_after")
        lines = [line for kept in read_run_metrics(run).values() for line in kept]
        return StackRun(
            adapter=sha256_file(adapter / "adapter_model.safetensors"),
            scores=tuple(card[name] for name in names),
            losses=tuple((line.step, line.loss, line.held_out_loss) for line in lines),
        )
