"""How soon commands answer: help, the first line of `data check`, and the second `make run`.

    python -m benchmarks.commands [--make-run] [--out FILE]

Help and `data check` are timed in a new project folder, as the best of five: other programs
can only make a command slower. With --make-run, `make run` is typed twice in a copy of this
checkout that shares its `.venv`; the second time its servers are up. Seconds on the clock and of
the processor are printed; the bars are for the clock of a machine with two idle cores. Exits with
1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, report

HELP_SECONDS, FIRST_LINE_SECONDS, SECOND_RUN_SECONDS = 0.5, 1.0, 60.0
TRIES = 5
COMMAND = (sys.executable, "-m", "qwen3ft")


def environment() -> dict[str, str]:
    """Return the environment of a machine without a GPU, in which this checkout is found."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def time_command(command: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a command; return the seconds to its first line, to its end, and of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first_line = time.monotonic() - began
        text = process.stdout.read()
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: {text.decode(errors='replace')[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"first_line_seconds": first_line, "seconds": seconds, "cpu_seconds": cpu}


def best(command: Sequence[str], folder: Path) -> dict[str, float]:
    """Return the smallest of each number in `TRIES` runs."""
    tries = [time_command(command, folder) for _ in range(TRIES)]
    return {name: round(min(one[name] for one in tries), 3) for name in tries[0]}


def second_run(folder: Path) -> dict[str, float]:
    """Type `make run` twice in a copy of this checkout; return the numbers of the second."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    run = ["make", "-s", "run", "PYTHON=true"]  # what `ready` installs is in .venv already
    try:
        time_command(run, folder)
        return {name: round(value, 1) for name, value in time_command(run, folder).items()}
    finally:
        subprocess.run([*COMMAND, "down"], cwd=folder, env=environment(), check=False)


def main() -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make-run", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qwen3ft-commands-") as name:
        project = Path(name).resolve() / "project"
        project.mkdir()
        time_command([*COMMAND, "init"], project)
        result: dict[str, Any] = {
            "help": best([*COMMAND, "--help"], project),
            "data_check": best([*COMMAND, "data", "check"], project),
        }
        bars = {
            f"help within {HELP_SECONDS} s": result["help"]["seconds"] <= HELP_SECONDS,
            f"first line of `data check` within {FIRST_LINE_SECONDS:.0f} s": result["data_check"][
                "first_line_seconds"
            ]
            <= FIRST_LINE_SECONDS,
        }
        if options.make_run:
            folder = Path(name).resolve() / "clone"
            folder.mkdir()
            second = result["second_make_run"] = second_run(folder)
            bars[f"second `make run` within {SECOND_RUN_SECONDS:.0f} s"] = (
                second["seconds"] <= SECOND_RUN_SECONDS
            )
        result["load_average"] = round(os.getloadavg()[0], 1)
        return report(result, bars, options.out)


if __name__ == "__main__":
    sys.exit(main())
