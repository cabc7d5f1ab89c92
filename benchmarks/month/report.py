"""The month's table, and the share of its time that was useful.

A night's total time runs from the request for its run until nothing of it runs any more, further
starts included. Its useful time is the time without faults: the seconds of the training steps in
the adapter (repeated steps count once), plus everything else, taken as the median of this month's
undisturbed nights of that kind. A night left undone was useful if the next one only had to finish
it, otherwise not; one that catches up by training does the work of two nights. The share is useful
over total time of all nights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.month.nights import BAD, GOOD
from qwen3ft.jobs.folders import RunDir

LEAST_SHARE = 0.95
"""Bar for the share of useful time."""


@dataclass
class NightResult:
    """Result of one night."""

    number: int
    date: str
    kind: str
    faults: list[str]
    struck: list[str]
    catches_up: bool = False
    states: list[str] = field(default_factory=list)
    verdict: str = ""
    message: str = ""
    champion: str | None = None
    champion_right: float | None = None
    attempts: int = 0
    total_seconds: float = 0.0
    trained_seconds: float = 0.0
    useful_seconds: float | None = None
    problems: list[str] = field(default_factory=list)
    interventions: list[str] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        """True if the night produced an adapter."""
        return self.trained_seconds > 0

    @property
    def lost_seconds(self) -> float | None:
        """Cost of the faults; None if no undisturbed night of the kind exists."""
        return None if self.useful_seconds is None else self.total_seconds - self.useful_seconds

    @property
    def left_undone(self) -> bool:
        """True if the next night had to finish this one."""
        return self.verdict in ("deferred", "not started")


def trained_seconds(run: Path) -> float:
    """Return the seconds of the training steps in a run's adapter; 0 without an adapter."""
    attempts = [job.path for job in RunDir(run).attempts()]
    done = [attempt for attempt in attempts if (attempt / "outcome.json").exists()]
    if not done:
        return 0.0
    attempt, until, seconds = done[-1], float("inf"), 0.0
    while True:
        times = [moment for step, moment in _steps(attempt) if step <= until]
        seconds += (max(times) - min(times)) if times else 0.0
        plan = json.loads((attempt / "plan.json").read_text(encoding="utf-8"))
        if plan["resume_from"] is None:
            return seconds
        checkpoint = Path(plan["resume_from"])
        attempt = run / "attempts" / checkpoint.parent.parent.name
        until = int(checkpoint.name.removeprefix("step-"))


def _steps(attempt: Path) -> list[tuple[int, float]]:
    """Return (optimizer step, seconds since 1970) of each line of an attempt's metrics."""
    steps = []
    for line in (attempt / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        steps.append((entry["step"], datetime.fromisoformat(entry["timestamp"]).timestamp()))
    return steps


def account(nights: Sequence[NightResult]) -> None:
    """Set the useful seconds of every night whose kind also passed undisturbed."""
    rest = _rest_seconds(nights)
    for night, after in zip(nights, [*nights[1:], None], strict=True):
        night.useful_seconds = None
        own = rest.get((night.trains, night.verdict == "failed"))
        if night.left_undone and not (after is not None and after.catches_up and not after.trains):
            night.useful_seconds = 0.0
        elif own is not None:
            others = rest.get((False, False), 0.0) if night.catches_up and night.trains else 0.0
            would_take = own + night.trained_seconds + others
            night.useful_seconds = min(night.total_seconds, would_take)


def _rest_seconds(nights: Sequence[NightResult]) -> dict[tuple[bool, bool], float]:
    """Return the time of undisturbed nights besides training, by (trains, fails)."""
    calm = [n for n in nights if not (n.faults or n.catches_up or n.left_undone)]
    kinds = {(night.trains, night.verdict == "failed") for night in calm}
    return {
        kind: median(
            night.total_seconds - night.trained_seconds
            for night in calm
            if (night.trains, night.verdict == "failed") == kind
        )
        for kind in kinds
    }


def useful_share(nights: Sequence[NightResult]) -> float | None:
    """Return the share of useful time; None if a kind of night never passed undisturbed."""
    known = [night.useful_seconds for night in nights if night.useful_seconds is not None]
    if len(known) < len(nights):
        return None
    return sum(known) / max(sum(night.total_seconds for night in nights), 1e-9)


def summarise(
    nights: Sequence[NightResult], planned: int, least_share: float = LEAST_SHARE
) -> dict[str, Any]:
    """Return counts, the share with its bar, and every night."""
    account(nights)
    share = useful_share(nights)
    good, bad = ([n for n in nights if n.kind in kinds] for kinds in (GOOD, BAD))
    worst = max(nights, key=lambda night: night.lost_seconds or 0.0, default=None)

    def of_verdict(among: Sequence[NightResult], verdict: str) -> int:
        return sum(night.verdict == verdict for night in among)

    return {
        "nights": len(nights),
        "planned_nights": planned,
        "faults": sum(len(night.faults) for night in nights),
        "interventions": [i for night in nights for i in night.interventions],
        "problems": [f"night {n.number}: {p}" for n in nights for p in n.problems],
        "promoted": of_verdict(nights, "promoted"),
        "good": len(good),
        "good_kept": [n.number for n in good if n.verdict == "kept"],
        "bad": len(bad),
        "bad_promoted": of_verdict(bad, "promoted"),
        "total_seconds": round(sum(night.total_seconds for night in nights), 1),
        "useful_share": None if share is None else round(share, 4),
        "least_useful_share": least_share,
        "longest_recovery": {
            "seconds": round(worst.lost_seconds or 0.0, 1) if worst else 0.0,
            "night": worst.number if worst else None,
            "faults": worst.faults if worst else [],
        },
        "every_night": [_rounded(asdict(night)) for night in nights],
    }


def passed(summary: dict[str, Any]) -> bool:
    """Return whether all nights meet all bars."""
    share = summary["useful_share"]
    return (
        summary["nights"] == summary["planned_nights"]
        and not summary["interventions"]
        and not summary["problems"]
        and summary["bad_promoted"] == 0
        and (share is None or share >= summary["least_useful_share"])
    )


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}


COLUMNS: tuple[tuple[str, int, Callable[[NightResult], str]], ...] = (
    ("night", 5, lambda n: str(n.number)),
    ("date", 10, lambda n: n.date),
    ("data", 9, lambda n: n.kind),
    ("ended as", 12, lambda n: n.verdict),
    ("tries", 5, lambda n: str(n.attempts or "")),
    ("champion", 8, lambda n: n.champion or "-"),
    ("right", 6, lambda n: "" if n.champion_right is None else f"{n.champion_right:.1%}"),
    ("s", 5, lambda n: f"{n.total_seconds:.0f}"),
    ("lost s", 6, lambda n: "" if n.lost_seconds is None else f"{n.lost_seconds:.0f}"),
    ("faults", 0, lambda n: "; ".join([*n.struck, *(f"PROBLEM: {p}" for p in n.problems)])),
)


def head() -> str:
    """Return the names of the columns."""
    return "  ".join(name.ljust(width) for name, width, _ in COLUMNS)


def line_of(night: NightResult) -> str:
    """Return a night as one line of text."""
    return "  ".join(show(night).ljust(width) for _, width, show in COLUMNS).rstrip()


def _share(share: float | None) -> str:
    return "unknown (no undisturbed night)" if share is None else f"{share:.1%}"


def print_summary(summary: dict[str, Any], nights: Sequence[NightResult]) -> None:
    """Print the whole table again, now with lost seconds, and the counts below."""
    print("\n" + head())
    for night in nights:
        print(line_of(night))
    worst = summary["longest_recovery"]
    print(
        f"\n{summary['nights']} of {summary['planned_nights']} nights, {summary['faults']} faults\n"
        f"manual interventions: {len(summary['interventions'])} "
        f"{'; '.join(summary['interventions'])}\n"
        f"invariants broken: {len(summary['problems'])} {'; '.join(summary['problems'])}\n"
        f"bad nights promoted: {summary['bad_promoted']} of {summary['bad']}\n"
        f"promotions: {summary['promoted']}, of {summary['good']} nights with good data; "
        f"kept by the gate: {summary['good_kept'] or 'none'}\n"
        f"useful time: {_share(summary['useful_share'])} of {summary['total_seconds']:.0f} s "
        f"(bar {summary['least_useful_share']:.0%})\n"
        f"longest recovery: {worst['seconds']:.0f} s, night {worst['night']} "
        f"({', '.join(worst['faults'])})"
    )
