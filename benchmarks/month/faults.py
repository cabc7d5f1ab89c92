"""Causes the month's faults from outside, by signals and mounts.

Two faults, NaN and out of memory, can only arise inside the process: the run's environment plants
them through `qwen3ft.faults`. All others strike processes while the night runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil

from benchmarks.month.nights import TRACKING_DOWN, Strike
from benchmarks.month.stack import Machine, kill, pause, resume
from deployments.processes import find_marked
from qwen3ft.disk.files import read_json_lines
from qwen3ft.jobs.folders import RunDir

TRACKING_HANGS_SECONDS = 40.0
FLOW_VARIABLE = "PREFECT__FLOW_RUN_ID"


@dataclass
class Scene:
    """The night as faults see it.

    Attributes:
        machine: The project's machine.
        output: First folder for adapters.
        known: Run folders of earlier nights.
        most_steps: Number of steps of a training.
    """

    machine: Machine
    output: Path
    known: frozenset[str]
    most_steps: int

    @property
    def root(self) -> Path:
        """Project folder."""
        return self.machine.stack.root

    def folders(self) -> list[Path]:
        """Return the run folders of this night."""
        runs = self.root / "runs"
        found = sorted(runs.iterdir()) if runs.is_dir() else []
        return [p for p in found if not p.name.startswith(".") and p.name not in self.known]

    def trained_share(self) -> float:
        """Return the progress of the night's training, 0 to 1; 0 before its first step."""
        share = 0.0
        for attempt in (job.path for run in self.folders() for job in RunDir(run).attempts()):
            plan, metrics = attempt / "plan.json", attempt / "metrics.jsonl"
            if plan.exists() and metrics.exists():
                lines = read_json_lines(metrics)
                total = json.loads(plan.read_text(encoding="utf-8"))["total_steps"]
                share = max(share, max((line["step"] for line in lines), default=0) / total)
        return share

    def was_tried_again(self) -> bool:
        """Return whether a training failed and was followed by another attempt."""
        return any((run / "attempts" / "02").exists() for run in self.folders())

    def has_evaluated(self) -> bool:
        """Return whether the candidate was tested; the promotion comes next."""
        return any((run / "jobs/inference/outcome.json").exists() for run in self.folders())

    def trainings(self) -> list[psutil.Process]:
        """Return the worker processes that train."""
        processes = find_marked(self.root, "worker")
        return [p for p in processes if _ask(p, psutil.Process.name) == "qwen3ft-train"]

    def flows(self) -> list[psutil.Process]:
        """Return the processes of flow runs; their children end with them."""
        processes = find_marked(self.root, "worker")
        return [p for p in processes if _flow(p) and not _has(p, "qwen3ft.worker")]

    def workers(self) -> list[psutil.Process]:
        """Return Prefect's worker alone; flow runs outlive it."""
        return [p for p in find_marked(self.root, "worker") if not _flow(p)]


@dataclass
class Fault:
    """One fault of a night: `begin`, then `look` repeatedly, then `end`."""

    name: str
    at: float
    scene: Scene
    effects: list[str] = field(default_factory=list)
    """Actions taken, with the number of processes hit."""

    def plan(self) -> str:
        """Return what plants the fault in the run's process; empty for a fault from outside."""
        actions = {"nan": "nan", "out of memory": "oom"}
        if self.name not in actions:
            return ""
        step = max(1, round(self.at * self.scene.most_steps))
        self.effects.append(f"planted at step {step}")
        return f"{actions[self.name]}@step={step}"

    @property
    def planted(self) -> bool:
        """True if the fault is planted in the process; a second attempt shows that it struck."""
        return type(self) is Fault

    def begin(self) -> None:
        """Act before the night's run is started."""

    def look(self) -> None:
        """Strike once, when its moment has come."""

    def end(self) -> None:
        """Undo what the fault changed, after the run ended."""


class InTraining(Fault):
    """Kills the processes of `victims` once the training's progress reaches `at`."""

    victims: ClassVar[Callable[[Scene], list[psutil.Process]]]

    def look(self) -> None:
        """See `Fault.look`."""
        if self.effects or (share := self.scene.trained_share()) < self.at:
            return
        if count := kill(type(self).victims(self.scene)):  # zero between two attempts
            self.effects.append(f"{count} killed at {share:.0%}")


class KillTraining(InTraining):
    """Kills the process that trains."""

    victims = Scene.trainings


class KillFlow(InTraining):
    """Kills the flow run's process."""

    victims = Scene.flows


class KillServer(InTraining):
    """Kills Prefect's server."""

    victims = staticmethod(lambda scene: find_marked(scene.root, "prefect"))


class KillWorker(InTraining):
    """Kills Prefect's worker."""

    victims = Scene.workers


class PowerCut(Fault):
    """Kills all processes of the project at once, their service manager's unit included."""

    def look(self) -> None:
        """See `Fault.look`."""
        if not self.effects and (share := self.scene.trained_share()) >= self.at:
            self.scene.machine.lose_power()
            self.effects.append(f"everything killed at {share:.0%}")


class KillAtPromotion(Fault):
    """Kills the flow's process `at` seconds after the candidate was tested."""

    tested: float | None = None

    def look(self) -> None:
        """See `Fault.look`."""
        if self.effects or not self.scene.has_evaluated():
            return
        self.tested = self.tested or time.monotonic()
        if time.monotonic() - self.tested >= self.at:
            count = kill(self.scene.flows())
            self.effects.append(f"{count} killed {self.at:.1f} s after the test")


class TrackingHangs(Fault):
    """Stops MLflow's server from answering for a while, from progress `at` on."""

    since: float | None = None

    def look(self) -> None:
        """See `Fault.look`."""
        if not self.effects and (share := self.scene.trained_share()) >= self.at:
            count = pause(find_marked(self.scene.root, "mlflow"))
            self.since = time.monotonic()
            self.effects.append(f"{count} hung at {share:.0%} for {TRACKING_HANGS_SECONDS:.0f} s")
        if self.since is not None and time.monotonic() - self.since > TRACKING_HANGS_SECONDS:
            self.end()

    def end(self) -> None:
        """See `Fault.end`."""
        if self.since is not None:
            resume(find_marked(self.scene.root, "mlflow"))
            self.since = None


class TrackingDown(Fault):
    """Kills MLflow's server whenever it is started, all night."""

    count: int = 0

    def begin(self) -> None:
        """See `Fault.begin`."""
        self.look()

    def look(self) -> None:
        """See `Fault.look`."""
        self.count += kill(find_marked(self.scene.root, "mlflow"))

    def end(self) -> None:
        """See `Fault.end`."""
        self.effects.append(f"{self.count} processes killed")


class FullDisk(Fault):
    """Fills the disk under the output folder; without root, makes the folder read-only."""

    mounted: bool = False

    def begin(self) -> None:
        """See `Fault.begin`."""
        folder = self.scene.output
        folder.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
        self.mounted = (
            os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
        )
        if not self.mounted:
            folder.chmod(0o500)
        self.effects.append("no room (tmpfs)" if self.mounted else "no permission to write")

    def end(self) -> None:
        """See `Fault.end`."""
        if self.mounted:
            subprocess.run(["umount", str(self.scene.output)], check=True)
            self.mounted = False
        else:
            self.scene.output.chmod(0o700)


FAULTS: dict[str, type[Fault]] = {
    "kill training": KillTraining,
    "kill flow": KillFlow,
    "kill server": KillServer,
    "kill worker": KillWorker,
    "power cut": PowerCut,
    "kill at promotion": KillAtPromotion,
    "tracking hangs": TrackingHangs,
    TRACKING_DOWN: TrackingDown,
    "full disk": FullDisk,
    "nan": Fault,
    "out of memory": Fault,
}
"""Faults by name; double and second starts and a machine that is off are the campaign's."""


def make_faults(strikes: list[Strike], undone: str, scene: Scene) -> list[Fault]:
    """Return the faults of a night."""
    wanted = [(strike.name, strike.at) for strike in strikes] + [(undone, 0.0)]
    return [FAULTS[name](name, at, scene) for name, at in wanted if name in FAULTS]


def _has(process: psutil.Process, *words: str) -> bool:
    return all(word in _ask(process, psutil.Process.cmdline) for word in words)


def _flow(process: psutil.Process) -> bool:
    return bool((_ask(process, psutil.Process.environ) or {}).get(FLOW_VARIABLE))


def _ask(process: psutil.Process, question: Callable[[psutil.Process], Any]) -> Any:
    try:
        return question(process)
    except psutil.Error:
        return ()
