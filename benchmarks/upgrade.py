"""Check that this version takes over runs, adapters and a champion of an older one.

    python -m benchmarks.upgrade --since COMMIT [--work DIR]

Checks COMMIT out beside this tree and lets it make a project: a promoted run, and one whose process
is killed between two checkpoints. Then this version resumes the killed run, answers with the old
adapter, compares a new candidate with the old champion, promotes the old version and rolls back.
Needs no GPU and no network; both versions run on the libraries that are installed. Exits with 1 if
a step fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

COMMAND = "import sys; from flows.cli import main; sys.exit(main())"
CHECKPOINT_EVERY_STEPS = 20
START_SECONDS = 180.0
PATIENT = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180"}  # on a busy machine
QUESTION = "Which colour does the Tavora lamp have?"


class Project:
    """A project folder on which two versions of the code work in turn.

    Args:
        root: The folder; made here.
        old: The tree of the older version.
    """

    def __init__(self, root: Path, old: Path) -> None:
        self.root, self.old = root, old
        deployments = root / "deployments"
        shutil.copytree(old / "deployments" / "configs", deployments / "configs")
        shutil.copy(old / "deployments" / "prefect.yaml", deployments)
        (root / ".qwen3ft").mkdir()  # older versions did not make it without servers

    def start(self, tree: Path, *arguments: str) -> subprocess.Popen[str]:
        """Start `qwen3ft ARGUMENTS` of the version in `tree`, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": "", **PATIENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if "--json" not in arguments else None,
            start_new_session=True,
            text=True,
        )

    def run(self, tree: Path, *arguments: str) -> str:
        """Return what `qwen3ft ARGUMENTS` prints.

        Raises:
            RuntimeError: the command failed; holds the end of its output.
        """
        process = self.start(tree, *arguments)
        output, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"qwen3ft {' '.join(arguments)}: {output[-2000:]}")
        return output

    def train(self, tree: Path, *arguments: str) -> dict[str, Any]:
        """Train to the end and return the run card."""
        card: dict[str, Any] = json.loads(self.run(tree, "train", "--json", *arguments))
        return card

    def kill_training(self, tree: Path, *arguments: str) -> str:
        """Start a training, kill its processes at its first checkpoint, return the run's id."""
        before = set(self.root.glob("runs/*"))
        process = self.start(tree, "train", *arguments)
        deadline = time.monotonic() + START_SECONDS
        while not (found := self._checkpoint(before)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no checkpoint was written: {process.communicate()[0][-2000:]}")
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)  # its worker dies with it
        process.wait()
        return found

    def _checkpoint(self, before: set[Path]) -> str:
        for run in set(self.root.glob("runs/*")) - before:
            if any(run.glob("attempts/01/checkpoints/step-*/manifest.json")):
                return run.name
        return ""


def check_out(commit: str, folder: Path) -> Path:
    """Unpack the tree of `commit` into `folder`."""
    archive = subprocess.run(
        ["git", "archive", commit], cwd=ROOT, capture_output=True, check=True
    ).stdout
    packed = folder.with_suffix(".tar")
    packed.write_bytes(archive)
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    # A local model is known by the times of its files too: one copy serves both versions.
    model = Path("qwen3ft", "embedded", "model")
    shutil.rmtree(folder / model)
    (folder / model).symlink_to(ROOT / model)
    return folder


def steps(project: Project) -> Sequence[tuple[str, Callable[[], str]]]:
    """Return the steps by name; each returns what it saw, or raises."""
    config = ("--config", "deployments/configs/embedded.yaml")
    often = ("--set", f"evaluate_every_steps={CHECKPOINT_EVERY_STEPS}")
    state: dict[str, Any] = {}

    def old_champion() -> str:
        state["first"] = project.train(project.old, *config)
        expect(state["first"]["outcome"] == "promoted", state["first"]["outcome"])
        return str(state["first"]["verdict"])

    def old_interrupted() -> str:
        state["killed"] = project.kill_training(project.old, *config, *often, "--set", "seed=1")
        return f"run {state['killed']} killed"

    def resume() -> str:
        card = project.train(ROOT, *config, *often, "--set", "seed=1", "--resume", state["killed"])
        second = card["attempts"][-1]
        expect(len(card["attempts"]) == 2, f"{len(card['attempts'])} attempts")
        expect(card["outcome"] in ("promoted", "kept"), card["outcome"])
        return f"{second['outcome']}, {card['outcome']}"

    def answer() -> str:
        return project.run(ROOT, "generate", "--adapter", "1", QUESTION).strip().splitlines()[-1]

    def compare() -> str:
        card = project.train(ROOT, *config, "--set", "seed=2")
        expect(card["outcome"] in ("promoted", "kept"), card["outcome"])
        expect("champion" in json.dumps(card["scores"]), "the champion was not scored")
        return str(card["verdict"])

    def promote() -> str:
        return project.run(ROOT, "promote", "1").strip().splitlines()[-1]

    def roll_back() -> str:
        return project.run(ROOT, "rollback", "--reason", "upgrade test").strip().splitlines()[-1]

    return (
        ("older version: a champion", old_champion),
        ("older version: a killed run", old_interrupted),
        ("resume the killed run", resume),
        ("answer with the old adapter", answer),
        ("compare a candidate with the champion", compare),
        ("promote the old version by hand", promote),
        ("roll back", roll_back),
    )


def expect(holds: bool, seen: str) -> None:
    """Raise RuntimeError that names what was seen unless `holds`."""
    if not holds:
        raise RuntimeError(f"unexpected: {seen}")


def main() -> int:
    """Run every step, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--since", required=True, metavar="COMMIT", help="the older version")
    parser.add_argument("--work", type=Path, help="where to work; a temporary folder by default")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="qwen3ft-upgrade-"))
    work.mkdir(parents=True, exist_ok=True)
    project = Project(work / "project", check_out(arguments.since, work / "old"))
    for name, step in steps(project):
        started = time.monotonic()
        try:
            seen, failed = step(), False
        except RuntimeError as error:
            seen, failed = str(error), True
        print(
            f"{'FAILED' if failed else 'ok':6} {time.monotonic() - started:5.0f} s  {name}: {seen}"
        )
        if failed:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
