"""Opens hostile artifacts the way qwen3ft does, and counts what they get done.

    python -m benchmarks.hostile.campaign [--kind data] [--case NAME] [--jobs 2] [--out FILE]

Each case (`case.py`) is built, then opened in a process of its own, and ends as one of these:

    executed      code of the artifact ran, a file appeared outside of its folder, or a control
                  sequence reached the terminal
    hung          10 s of CPU time were used, or 120 s passed
    memory        the process and its children held more than 1 GB
    unclassified  a traceback, a crash, or an error without what, why and next command
    accepted      taken as it is, without a word
    harmless      the same, and rightly (`Case.harmless`)
    refused       refused, or put into quarantine, with a reason

Exits with 1 if any case ends otherwise than as harmless or refused.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count, repeat
from pathlib import Path
from typing import Any

import psutil

from benchmarks.hostile.case import Case, canary_of
from benchmarks.hostile.cases import all_cases
from benchmarks.hostile.child import READY, RESULT
from benchmarks.jobs import python_path
from benchmarks.machine import machine, write_json
from qwen3ft.units import GIB, MIB

MOST_CPU_SECONDS, MOST_SECONDS, MOST_BYTES = 10.0, 120.0, GIB
START_SECONDS = 120.0
"""Longest start of a process: imports only."""
GOOD = ("refused", "harmless")
ENDS = ("executed", "hung", "memory", "unclassified", "accepted", *GOOD)
_POLL_SECONDS = 0.02
# Everything that a terminal obeys: C0 without tab and newline, DEL, C1, direction marks.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Ended:
    """End of one case."""

    name: str
    kind: str
    ended_as: str
    reason: str
    cpu_seconds: float
    """CPU time of opening it, imports aside."""
    peak_mib: int
    """Most memory of the process and its children, imports included; shared pages count once."""


def run_case(case: Case, work: Path, number: int = 0) -> Ended:
    """Build and open `case` below the folder `work`, which is removed afterwards."""
    root = work / f"{number:03}"
    outside, state = root / "outside", root / "state"
    inside = outside / "inside"
    for folder in (inside, state):
        folder.mkdir(parents=True)
    try:
        _python("build", case, inside, state).check_returncode()
        ended_as, reason, cpu_seconds, peak_bytes = _open(case, inside, state)
        strangers = sorted(path.name for path in outside.iterdir() if path != inside)
        if strangers:
            what = "it ran" if canary_of(inside).name in strangers else "written outside"
            ended_as, reason = "executed", f"{what}: {', '.join(strangers)}"
        return Ended(
            case.name,
            case.kind,
            ended_as,
            reason.strip(),
            round(cpu_seconds, 2),
            peak_bytes // MIB,
        )
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _command(action: str, case: Case, inside: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.hostile.child", action, case.name, str(inside)]


def _environment(state: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": python_path(),
        "HOME": str(state),  # nothing of this user's is read or written
        "HF_HOME": str(state / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PREFECT_HOME": str(state / "prefect"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


def _python(
    action: str, case: Case, inside: Path, state: Path
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        _command(action, case, inside), cwd=state, env=_environment(state), check=False
    )


def _open(case: Case, inside: Path, state: Path) -> tuple[str, str, float, int]:
    """Return (how it ended, reason, CPU seconds, most bytes) of opening a case."""
    shown = state / "shown"
    with shown.open("wb") as stream:
        process = psutil.Popen(
            _command("open", case, inside),
            cwd=state,
            env=_environment(state),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        limit, cpu_seconds, peak_bytes = _watch(process, state / READY)
    output = shown.read_text(encoding="utf-8", errors="replace")
    if limit:
        return limit, f"after {cpu_seconds:.1f} s of CPU", cpu_seconds, peak_bytes
    if control := _CONTROL.search(output):
        return "executed", f"{control.group()!r} was printed", cpu_seconds, peak_bytes
    if not (state / RESULT).exists():
        reason = f"exit status {process.returncode}: {output[-1000:]}"
        return "unclassified", reason, cpu_seconds, peak_bytes
    result = json.loads((state / RESULT).read_text(encoding="utf-8"))
    ended_as = result["ended_as"]
    if ended_as == "accepted" and case.harmless:
        ended_as = "harmless"
    return ended_as, result["reason"], cpu_seconds, peak_bytes


def _watch(process: psutil.Popen, ready: Path) -> tuple[str, float, int]:
    """Wait for the end, or end it at a limit; return (limit or '', CPU seconds, most bytes)."""
    began = time.monotonic()
    opened: float | None = None
    before = cpu_seconds = 0.0
    peak_bytes, limit = 0, ""
    while process.poll() is None and not limit:
        now_seconds, now_bytes = _usage(process)
        if opened is None and ready.exists():
            opened, before = time.monotonic(), now_seconds
        cpu_seconds = max(cpu_seconds, now_seconds - before if opened else 0.0)
        peak_bytes = max(peak_bytes, now_bytes)
        if peak_bytes > MOST_BYTES:
            limit = "memory"
        elif opened is None:
            limit = "hung" if time.monotonic() - began > START_SECONDS else ""
        elif cpu_seconds > MOST_CPU_SECONDS or time.monotonic() - opened > MOST_SECONDS:
            limit = "hung"
        time.sleep(_POLL_SECONDS)
    with suppress(ProcessLookupError):  # the session has whatever it started and left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return limit, cpu_seconds, peak_bytes


def _usage(process: psutil.Popen) -> tuple[float, int]:
    """Return CPU seconds and memory of a process and all below it, in bytes."""
    seconds, held = 0.0, 0
    with suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                seconds += times.user + times.system
                held += _held_bytes(one)
    return seconds, held


def _held_bytes(process: psutil.Process) -> int:
    """Return the memory of a process, with its share of the pages that others have too (PSS).

    Helpers that are forked share the imports of their parent: resident sizes would count these for
    each of them.
    """
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))
    return int(process.memory_info().rss)


def summarise(ended: Sequence[Ended]) -> dict[str, Any]:
    """Return machine, counts by kind and end, and every case."""
    kinds = list(dict.fromkeys(one.kind for one in ended))
    counts = {kind: Counter(one.ended_as for one in ended if one.kind == kind) for kind in kinds}
    return {
        "machine": machine(),
        "cases": len(ended),
        "bad": [one.name for one in ended if one.ended_as not in GOOD],
        "counts": {kind: {end: count[end] for end in ENDS} for kind, count in counts.items()},
        "ended": [asdict(one) for one in ended],
    }


def table(results: dict[str, Any]) -> str:
    """Return the counts as a table in markdown."""
    lines = [f"| {' | '.join(('kind', *ENDS))} |", f"|---{'|---' * len(ENDS)}|"]
    for kind, counts in results["counts"].items():
        lines.append(f"| {' | '.join((kind, *(str(counts[end]) for end in ENDS)))} |")
    found = results["machine"]
    lines += ["", f"{results['cases']} cases, {found['date']}, {found['cpu_count']} CPU cores"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases and print the table; return 1 if one ended badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", help="only cases of this kind")
    parser.add_argument("--case", help="only the case of this name")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    cases = [
        case
        for case in all_cases()
        if asked.kind in (None, case.kind) and asked.case in (None, case.name)
    ]
    if not cases:
        parser.error("there is no such case")
    with (
        tempfile.TemporaryDirectory(prefix="qwen3ft-hostile-") as folder,
        ThreadPoolExecutor(asked.jobs) as pool,
    ):
        ended = []
        for one in pool.map(run_case, cases, repeat(Path(folder)), count()):
            ended.append(one)
            line = f"{one.ended_as:12} {one.kind:9} {one.name:40} {one.cpu_seconds:5.1f} s"
            reason = ascii(one.reason.splitlines()[-1] if one.reason else "")[1:-1]
            print(f"{line} {one.peak_mib:5} MiB  {reason[:110]}", flush=True)
    results = summarise(ended)
    print(table(results))
    if asked.out:
        write_json(asked.out, results)
    return int(bool(results["bad"]))


if __name__ == "__main__":
    sys.exit(main())
