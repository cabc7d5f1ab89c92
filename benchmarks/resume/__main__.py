"""Interrupt runs with random settings at random stages, and resume them as printed.

    python -m benchmarks.resume --runs 200 --lanes 2 --out FILE [--minutes 60]

Settings are drawn by a seed and are not the defaults. A run with them is trained once undisturbed.
Then some cases of it are trained, each with a fault planted somewhere between its first line of the
journal and its promotion (`qwen3ft.faults`), and continued with the command that the terminal or
the card prints, and nothing else. All must end alike: the verdict, the scores and the adapter's
bytes, with the settings asked for in config.json, in MLflow, on the card and in the adapter. Last,
resuming once more must change nothing.

Each lane has a folder and servers of its own below `--work` and one core; it needs no `.venv`. The
results are written after each case. A case that failed has the ends of its logs in them.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, write_json
from benchmarks.resume.cases import CASES_OF_SETTINGS, NOT_INTERRUPTED, Case, cases_of
from benchmarks.resume.checkout import register_checkout
from benchmarks.resume.project import Clock, Project, TimeIsUpError

_FIRST_PORT = 21000
_PORTS_OF_LANE = 20
"""Lanes choose their ports at the same time, and a port that is taken is passed over."""

_MOST_EVIDENCE = 20
"""Failed cases whose logs are kept."""


@dataclass
class Campaign:
    """The cases of all lanes, those in progress when the time was up, and lanes without servers."""

    runs: int
    seed: int
    on_case: Callable[[Campaign], None] = lambda _: None
    cases: list[Case] = field(default_factory=list)
    broken_off: int = 0
    without_servers: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def good(self) -> int:
        """Number of cases that ended as undisturbed."""
        return sum(not case.problems for case in self.cases)

    @property
    def stages(self) -> dict[str, int]:
        """Number of cases by the stage that they were interrupted at."""
        return dict(Counter(case.stage for case in self.cases).most_common())

    def add(self, case: Case) -> None:
        """Add a case that ended."""
        with self._lock:
            if sum(bool(each.evidence) for each in self.cases) >= _MOST_EVIDENCE:
                case.evidence = {}
            self.cases.append(case)
            self.cases.sort(key=lambda each: each.number)
            end = "; ".join(case.problems) or f"{case.outcome}, as undisturbed"
            seconds = time.monotonic() - self.began
            print(f"{seconds:5.0f} s {case.number:4d} {case.fault} ({case.stage}): {end}")
            sys.stdout.flush()
            self.on_case(self)

    def break_off(self) -> None:
        """Count a case that did not end in time."""
        with self._lock:
            self.broken_off += 1

    def describe(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)  # without that of the servers
        return {
            "machine": machine(),
            "runs": len(self.cases),
            "good": self.good,
            "interrupted": sum(case.stage != NOT_INTERRUPTED for case in self.cases),
            "broken_off": self.broken_off,
            "without_servers": self.without_servers,
            "seed": self.seed,
            "stages": self.stages,
            "outcomes": dict(Counter(case.outcome for case in self.cases)),
            "seconds": round(time.monotonic() - self.began),
            "cpu_seconds": round(used.ru_utime + used.ru_stime),
            "cases": [case.describe() for case in self.cases],
        }

    def run(self, work: Path, lanes: int, clock: Clock) -> None:
        """Run cases until there are enough or the time is up, then stop all servers.

        Raises:
            RuntimeError: no run can start on this machine.
        """
        numbers = iter(range(-(-self.runs // CASES_OF_SETTINGS)))
        paths = register_checkout(work / "site")
        projects = [
            Project(work / f"lane-{lane:02d}", _FIRST_PORT + lane * _PORTS_OF_LANE, clock, paths)
            for lane in range(lanes)
        ]
        projects[0].check()
        with ThreadPoolExecutor(lanes) as pool:
            futures = [pool.submit(self._lane, project, numbers) for project in projects]
        for future in futures:
            future.result()

    def _lane(self, project: Project, numbers: Iterator[int]) -> None:
        try:
            project.up()
            while (number := self._next(numbers)) is not None:
                left = min(CASES_OF_SETTINGS, self.runs - number * CASES_OF_SETTINGS)
                for case in itertools.islice(cases_of(project, self.seed, number), left):
                    self.add(case)
        except TimeIsUpError:
            self.break_off()
        except RuntimeError as error:  # its servers did not start; the other lanes go on
            self.without_servers.append(str(error))
        finally:
            project.down()

    def _next(self, numbers: Iterator[int]) -> int | None:
        with self._lock:
            return next(numbers, None)


def main() -> int:
    """Run the campaign; print and store what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=1, help="cases at the same time")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="end after this long")
    parser.add_argument("--work", type=Path, help="an empty folder; by default a temporary one")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="qwen3ft-resume-"))).resolve()
    clock = Clock(60 * options.minutes)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: clock.end())

    def save(campaign: Campaign) -> None:
        if options.out:
            write_json(options.out, campaign.describe())

    campaign = Campaign(options.runs, options.seed, save)
    try:
        campaign.run(work, options.lanes, clock)
    except RuntimeError as error:
        sys.exit(str(error))
    save(campaign)
    print(
        f"{campaign.good} of {len(campaign.cases)} runs ended as undisturbed, "
        f"{campaign.broken_off} broken off; interrupted at: {campaign.stages}"
    )
    return 0 if campaign.good == len(campaign.cases) == options.runs else 1


if __name__ == "__main__":
    sys.exit(main())
