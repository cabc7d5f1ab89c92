"""How the month's faults are brought about: from outside, by signals, mounts and the clock.

Two faults are planted through `qwen3ft.training.faults` (NaN, out of memory), since only the
process itself can have them; a run's environment asks for them. All others strike processes that
are found by what they are, while the night runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.month.nights import TRACKING_DOWN, Strike
from benchmarks.month.stack import Machine, go_on, kill, pause
from deployments.processes import find_marked
from qwen3ft.files import read_json_lines
from qwen3ft.training.faults import VARIABLE

TRACKING_HANGS_SECONDS = 40.0
FLOW_VARIABLE = "PREFECT__FLOW_RUN_ID"


@dataclass
class Scene:
    """What a fault needs to know of the night.

    Attributes:
        machine: The project's machine.
        output: Where adapters are saved first.
        known: Run folders of the nights before.
        most_steps: Of a training.
    """

    machine: Machine
    output: Path
    known: frozenset[str]
    most_steps: int

    @property
    def root(self) -> Path:
        """The project folder."""
        return self.machine.stack.root

    def folders(self) -> list[Path]:
        """Run folders of this night."""
        runs = self.root / "runs"
        found = sorted(runs.iterdir()) if runs.is_dir() else []
        return [p for p in found if not p.name.startswith(".") and p.name not in self.known]

    def trained_share(self) -> float:
        """How far the night's training is, 0 to 1; 0 before its first step."""
        share = 0.0
        for attempt in (a for run in self.folders() for a in run.glob("attempts/[0-9][0-9]")):
            plan, metrics = attempt / "plan.json", attempt / "metrics.jsonl"
            if plan.exists() and metrics.exists():
                lines, _ = read_json_lines(metrics, 0)
                total = json.loads(plan.read_text(encoding="utf-8"))["total_steps"]
                share = max(share, max((line["step"] for line in lines), default=0) / total)
        return share

    def was_tried_again(self) -> bool:
        """Whether a training failed and was followed by another attempt."""
        return any((run / "attempts" / "02").exists() for run in self.folders())

    def has_evaluated(self) -> bool:
        """Whether the candidate was tested; what follows is the promotion."""
        return any((run / "jobs/inference/outcome.json").exists() for run in self.folders())

    def trainings(self) -> list[psutil.Process]:
        """Worker processes that train."""
        processes = find_marked(self.root, "worker")
        return [p for p in processes if _asked(p, psutil.Process.name) == "qwen3ft-train"]

    def flows(self) -> list[psutil.Process]:
        """Processes of flow runs; what they started ends with them, by itself."""
        processes = find_marked(self.root, "worker")
        return [p for p in processes if _flow(p) and not _has(p, "qwen3ft.worker")]

    def workers(self) -> list[psutil.Process]:
        """Prefect's worker alone; a flow run's process goes on without it."""
        return [p for p in find_marked(self.root, "worker") if not _flow(p)]


@dataclass
class Striker:
    """One fault of a night: `begin`, then `look` again and again, then `end`."""

    name: str
    at: float
    scene: Scene
    told: list[str] = field(default_factory=list)
    """What was done, with the number of processes that it met."""

    def environment(self) -> dict[str, str]:
        """What a run is asked to have planted."""
        planted = {"nan": "nan", "out of memory": "oom"}
        if self.name not in planted:
            return {}
        step = max(1, round(self.at * self.scene.most_steps))
        self.told.append(f"planted at step {step}")
        return {VARIABLE: f"{planted[self.name]}@step={step}"}

    @property
    def planted(self) -> bool:
        """Whether it waits in the run's process: then only a second attempt shows it struck."""
        return type(self) is Striker

    def begin(self) -> None:
        """Before the night's run is started."""

    def look(self) -> None:
        """While it runs; strikes once."""

    def end(self) -> None:
        """After it ended: what was taken away is given back."""


class InTraining(Striker):
    """Kills what `victims` finds once the training has come as far as `at`."""

    victims: Callable[[Scene], list[psutil.Process]]

    def look(self) -> None:
        """See `Striker.look`."""
        if self.told or (share := self.scene.trained_share()) < self.at:
            return
        if count := kill(type(self).victims(self.scene)):  # none between two attempts
            self.told.append(f"{count} killed at {share:.0%}")


class KillTraining(InTraining):
    """The process that trains."""

    victims = Scene.trainings


class KillFlow(InTraining):
    """The flow run's process."""

    victims = Scene.flows


class KillServer(InTraining):
    """Prefect's server."""

    victims = staticmethod(lambda scene: find_marked(scene.root, "prefect"))


class KillWorker(InTraining):
    """Prefect's worker."""

    victims = Scene.workers


class PowerCut(Striker):
    """All processes of the project at once, the one that keeps them up included."""

    def look(self) -> None:
        """See `Striker.look`."""
        if not self.told and (share := self.scene.trained_share()) >= self.at:
            self.scene.machine.lose_power()
            self.told.append(f"everything killed at {share:.0%}")


class KillAtPromotion(Striker):
    """The flow's process, a moment (`at` in seconds) after the candidate was tested."""

    tested: float | None = None

    def look(self) -> None:
        """See `Striker.look`."""
        if self.told or not self.scene.has_evaluated():
            return
        self.tested = self.tested or time.monotonic()
        if time.monotonic() - self.tested >= self.at:
            count = kill(self.scene.flows())
            self.told.append(f"{count} killed {self.at:.1f} s after the test")


class TrackingHangs(Striker):
    """MLflow's server answers nothing for a while, from somewhere in the training on."""

    since: float | None = None

    def look(self) -> None:
        """See `Striker.look`."""
        if not self.told and (share := self.scene.trained_share()) >= self.at:
            count = pause(find_marked(self.scene.root, "mlflow"))
            self.since = time.monotonic()
            self.told.append(f"{count} hung at {share:.0%} for {TRACKING_HANGS_SECONDS:.0f} s")
        if self.since is not None and time.monotonic() - self.since > TRACKING_HANGS_SECONDS:
            self.end()

    def end(self) -> None:
        """See `Striker.end`."""
        if self.since is not None:
            go_on(find_marked(self.scene.root, "mlflow"))
            self.since = None


class TrackingDown(Striker):
    """MLflow's server ends as often as it is started, all night."""

    count: int = 0

    def begin(self) -> None:
        """See `Striker.begin`."""
        self.look()

    def look(self) -> None:
        """See `Striker.look`."""
        self.count += kill(find_marked(self.scene.root, "mlflow"))

    def end(self) -> None:
        """See `Striker.end`."""
        self.told.append(f"{self.count} processes of it killed")


class FullDisk(Striker):
    """Where adapters are saved has no room; without root, may not be written."""

    mounted: bool = False

    def begin(self) -> None:
        """See `Striker.begin`."""
        folder = self.scene.output
        folder.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
        self.mounted = (
            os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
        )
        if not self.mounted:
            folder.chmod(0o500)
        self.told.append("no room (tmpfs)" if self.mounted else "no leave to write")

    def end(self) -> None:
        """See `Striker.end`."""
        if self.mounted:
            subprocess.run(["umount", str(self.scene.output)], check=True)
            self.mounted = False
        else:
            self.scene.output.chmod(0o700)


STRIKERS: dict[str, type[Striker]] = {
    "kill training": KillTraining,
    "kill flow": KillFlow,
    "kill server": KillServer,
    "kill worker": KillWorker,
    "power cut": PowerCut,
    "kill at promotion": KillAtPromotion,
    "tracking hangs": TrackingHangs,
    TRACKING_DOWN: TrackingDown,
    "full disk": FullDisk,
    "nan": Striker,
    "out of memory": Striker,
}
"""The others (double and second starts, a machine that is off) are the clock's."""


def strikers(strikes: list[Strike], undone: str, scene: Scene) -> list[Striker]:
    """What brings about a night's faults."""
    wanted = [(strike.name, strike.at) for strike in strikes] + [(undone, 0.0)]
    return [STRIKERS[name](name, at, scene) for name, at in wanted if name in STRIKERS]


def _has(process: psutil.Process, *words: str) -> bool:
    return all(word in _asked(process, psutil.Process.cmdline) for word in words)


def _flow(process: psutil.Process) -> bool:
    return bool((_asked(process, psutil.Process.environ) or {}).get(FLOW_VARIABLE))


def _asked(process: psutil.Process, question: Callable[[psutil.Process], Any]) -> Any:
    try:
        return question(process)
    except psutil.Error:
        return ()
