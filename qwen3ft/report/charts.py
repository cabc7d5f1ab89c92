"""The curves of a card as numbers to draw: paths and ticks in the units of an SVG's view box.

Guarantees: pure. Colours and text sizes are the page's business, so a chart is dark where the page
is. Ticks are matplotlib's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwen3ft.records.run_card import CurvePoint, LossCurve, MemoryCurve

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 14, 52
"""Margins, in the same units as width and height: about pixels on a phone held upright."""


@dataclass(frozen=True)
class Curve:
    """One curve; `kind` names its style on the page."""

    kind: str
    points: Sequence[CurvePoint]


@dataclass(frozen=True)
class Drawn:
    """One curve as an SVG path; a single point is a short stroke."""

    kind: str
    path: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis, with the number that stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Everything a page needs to draw a chart, and to say it in words."""

    name: str
    title: str
    words: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Drawn, ...]
    legend: tuple[tuple[str, str], ...]
    """(style, name) of each kind of line."""


def loss_chart(curves: Sequence[LossCurve]) -> Chart | None:
    """Training and held-out loss of all attempts; None where none was measured."""
    training = [Curve("training", curve.training) for curve in curves if curve.training]
    held_out = [Curve("held-out", curve.held_out) for curve in curves if curve.held_out]
    lines = [*training, *held_out]
    if not lines:
        return None
    words = "; ".join(
        _course(name, [point for line in group for point in line.points], "step", ".3f")
        for name, group in (("training", training), ("held out", held_out))
        if group
    )
    return _chart(
        "loss",
        "Loss",
        f"Nats per trained token over optimizer steps: {words}.",
        ("optimizer step", "nats per trained token"),
        lines,
        [("training", "training"), ("held-out", "held out")],
    )


def memory_chart(curves: Sequence[MemoryCurve]) -> Chart | None:
    """Memory of all attempts with what was predicted, and the budget; None without measurements."""
    process = [Curve("process", curve.process) for curve in curves if curve.process]
    if not process:
        return None
    lines = list(process)
    budgets: list[float] = []
    predictions: list[float] = []
    for curve in curves:
        for kind, level, found in (
            ("predicted", curve.predicted_gb, predictions),
            ("budget", curve.budget_gb, budgets),
        ):
            if level is not None:
                lines.append(Curve(kind, _level(curve, level)))
                found.append(level)
    highest = max(gb for line in process for _, gb in line.points)
    words = [f"At most {highest:.2f} GB in use"]
    words += [f"predicted {max(predictions):.2f} GB"] if predictions else []
    words += [f"budget {budgets[-1]:g} GB"] if budgets else []
    return _chart(
        "memory",
        "Memory",
        f"{', '.join(words)}.",
        ("minutes (pauses between attempts cut to 1)", "GB (2**30 bytes)"),
        lines,
        [("process", "whole process"), ("predicted", "predicted peak"), ("budget", "budget")],
        from_zero=True,
    )


def _level(curve: MemoryCurve, level: float) -> tuple[CurvePoint, ...]:
    return ((curve.start_minutes, level), (curve.end_minutes, level))


def _course(name: str, points: Sequence[CurvePoint], unit: str, digits: str) -> str:
    """`training from 2.104 to 0.031`, and where it was lowest."""
    first, last = points[0][1], points[-1][1]
    at, low = min(points, key=lambda point: point[1])
    told = f"{name} from {first:{digits}} to {last:{digits}}"
    return told if low == last else f"{told}, lowest {low:{digits}} at {unit} {at:,.0f}"


def _chart(
    name: str,
    title: str,
    words: str,
    labels: tuple[str, str],
    lines: Sequence[Curve],
    legend: Iterable[tuple[str, str]],
    *,
    from_zero: bool = False,
) -> Chart:
    points = [point for line in lines for point in line.points]
    x_low, x_high = _bounds([x for x, _ in points])
    y_low, y_high = _bounds([y for _, y in points])
    y_low, y_high = (0.0, 1.05 * y_high) if from_zero else (y_low, y_high)

    def place(point: CurvePoint) -> CurvePoint:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    kinds = {line.kind for line in lines}
    return Chart(
        name=name,
        title=title,
        words=words,
        x_label=labels[0],
        y_label=labels[1],
        x_ticks=tuple(Tick(place((x, y_low))[0], f"{x:g}") for x in _ticks(x_low, x_high)),
        y_ticks=tuple(Tick(place((x_low, y))[1], f"{y:g}") for y in _ticks(y_low, y_high)),
        lines=tuple(
            Drawn(line.kind, _path([place(point) for point in line.points])) for line in lines
        ),
        legend=tuple(entry for entry in legend if entry[0] in kinds),
    )


def _path(points: Sequence[CurvePoint]) -> str:
    told = "M" + "L".join(f"{x:g},{y:g}" for x, y in points)
    return told if len(points) > 1 else f"{told}h0.1"  # with round caps this is a dot


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, apart from each other."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{value:.6g}") for value in found if low <= value <= high]
