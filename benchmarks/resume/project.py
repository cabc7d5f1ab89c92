"""A project folder with servers of its own, and the commands that are typed in it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.jobs import python_path
from benchmarks.machine import ROOT
from deployments.stack import Stack
from qwen3ft import faults
from qwen3ft.embedded import DATA_DIR
from qwen3ft.jobs.folders import RunDir

COMMAND_SECONDS = 1800.0
"""Longest command; a machine under load is slow."""

ROWS = 160
SAME_ANSWER = "bronze"
"""Answer to every question of `same.jsonl`, which a few steps are enough to learn."""

EVIDENCE_LINES = 100

_UP = """
import sys
from pathlib import Path
from deployments.stack import Stack
Stack(Path.cwd(), {"prefect": int(sys.argv[1]), "mlflow": int(sys.argv[2])}).up(print)
"""
_RESUME_COMMAND = """
import sys
from pathlib import Path
from qwen3ft.jobs.folders import RunDir
print(RunDir(Path(sys.argv[1])).resume_command)
"""


class TimeIsUpError(Exception):
    """The campaign ended while a command was in progress."""


class Clock:
    """The time left, which `end` takes away; threads share it."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._ended = threading.Event()

    def end(self) -> None:
        """Let the time be up now."""
        self._ended.set()

    @property
    def is_over(self) -> bool:
        """True once the time is up."""
        return self._ended.is_set() or time.monotonic() > self._until


@dataclass(frozen=True)
class Ended:
    """A command that ended."""

    status: int
    output: str


class Project:
    """A project folder with servers of its own, and its commands.

    Args:
        root: A folder, made if missing; its servers are told apart from others by it.
        port: First port to try for its two servers.
        clock: A command in progress ends when its time is up.
        paths: Folders to put on PYTHONPATH beside the checkout.
    """

    def __init__(self, root: Path, port: int, clock: Clock, paths: Sequence[str] = ()) -> None:
        self.root = root
        # this checkout, no GPU, and a core for each lane
        self._variables = {
            "PYTHONPATH": os.pathsep.join([python_path(), *paths]),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.stack = Stack(root)
        self._ports = (str(port), str(port + 1))
        self._clock = clock
        for part in ("configs", "prefect.yaml"):
            source = ROOT / "deployments" / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            (root / "deployments").mkdir(exist_ok=True, parents=True)
            copy(source, root / "deployments" / part)
        (root / "flows").symlink_to(ROOT / "flows")
        (root / "commands").mkdir()
        self._write_data()

    def check(self) -> None:
        """Look for what no run can do without.

        Raises:
            RuntimeError: a package is missing or too old, or the disk is full.
        """
        ended = self.command("doctor")
        if ended.status:
            raise RuntimeError(f"no run can start here: {ended.output}")

    def up(self) -> None:
        """Start the servers.

        Raises:
            RuntimeError: they did not start.
        """
        ended = self._python("-c", _UP, *self._ports)
        if ended.status:
            raise RuntimeError(f"the servers of {self.root} did not start: {ended.output[-2000:]}")

    def down(self) -> None:
        """Stop the servers and whatever runs on them."""
        self.stack.down()

    def command(self, *arguments: str, fault: str = "") -> Ended:
        """Run `qwen3ft ARGUMENTS` with a planted fault; what it prints is kept as evidence.

        Raises:
            TimeIsUpError: the campaign ended first.
        """
        return self._python("-m", "qwen3ft", *arguments, fault=fault)

    def train(self, settings: dict[str, Any], fault: str = "") -> tuple[RunDir | None, str]:
        """Train, and return the run, if it began, and what was printed.

        Raises:
            TimeIsUpError: the campaign ended first.
        """
        path = self.root / f"{settings['name']}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        ended = self.command("train", "--config", str(path), fault=fault)
        begun = (self.root / settings["runs_dir"]).glob("*/config.json")
        mine = [each for each in begun if json.loads(each.read_text())["name"] == settings["name"]]
        run = RunDir(mine[0].parent.resolve()) if mine else None
        return run, ended.output

    def printed_command(self, run: RunDir, shown: str) -> list[str]:
        """Return the words after `qwen3ft` of the command that resumes the run, as it was printed.

        A process that was killed printed none; the command that any card would have holds then.
        """
        path = run.path / "card.md"
        texts = [shown, path.read_text(encoding="utf-8") if path.exists() else ""]
        for text in texts:
            found = re.search(rf"qwen3ft run --resume {re.escape(run.path.name)}[^\n`|]*", text)
            if found is not None:
                return shlex.split(found[0].replace("\\", ""))[1:]
        return shlex.split(self._python("-c", _RESUME_COMMAND, str(run.path)).output)[1:]

    def evidence(self, run: RunDir | None, since: int) -> dict[str, list[str]]:
        """Return the ends of logs by name: of commands from number `since` on, and of the run."""
        files = [file for file in self._outputs() if int(file.stem) >= since]
        if run is not None:
            files += [run.log, *sorted(run.path.rglob("worker.log"))]
        files += [self.stack.layout().log("worker")]
        return {
            str(file.relative_to(self.root)): _last_lines(file) for file in files if file.exists()
        }

    @property
    def commands_so_far(self) -> int:
        """Number of commands that were typed."""
        return len(self._outputs())

    def _python(self, *arguments: str, fault: str = "") -> Ended:
        output = self.root / "commands" / f"{self.commands_so_far:04d}.log"
        planted = {faults.VARIABLE: fault} if fault else {}
        with output.open("wb") as stream:
            stream.write(f"{list(arguments)} {planted}\n".encode())
            stream.flush()
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.root,
                env={**os.environ, **self._variables, **planted},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                self._wait(process)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text = output.read_text(encoding="utf-8", errors="replace")
        return Ended(process.returncode, text.split("\n", 1)[1])

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + COMMAND_SECONDS
        while time.monotonic() < end:
            try:
                process.wait(0.25)
            except subprocess.TimeoutExpired:
                if self._clock.is_over:
                    raise TimeIsUpError from None
            else:
                return

    def _outputs(self) -> list[Path]:
        return sorted((self.root / "commands").glob("*.log"))

    def _write_data(self) -> None:
        lines = (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()
        (self.root / "data").mkdir()
        for place, name in enumerate("abc"):
            rows = [json.loads(line) for line in lines[place * ROWS : (place + 1) * ROWS]]
            self._write_rows(name, {row["question"]: row["answer"] for row in rows})
            if name == "a":
                self._write_rows("same", {row["question"]: SAME_ANSWER for row in rows})

    def _write_rows(self, name: str, answers: dict[str, str]) -> None:
        text = [json.dumps({"frage": key, "antwort": value}) for key, value in answers.items()]
        (self.root / "data" / f"{name}.jsonl").write_text("\n".join(text), encoding="utf-8")


def _last_lines(file: Path) -> list[str]:
    with file.open(encoding="utf-8", errors="replace") as stream:
        return [line.rstrip("\n")[:1000] for line in deque(stream, EVIDENCE_LINES)]
