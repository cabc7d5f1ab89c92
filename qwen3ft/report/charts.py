"""The curves of the run card as SVG paths and ticks, and in words.

The page styles them, so charts follow its theme and text size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwen3ft.records.run_card import CurvePoint, LossCurve, MemoryCurve

SIZE = {"width": 640, "height": 300, "left": 64, "right": 24, "top": 14, "bottom": 52}
"""Size and margins in view box units: about pixels on a phone held upright."""


@dataclass(frozen=True)
class Curve:
    """One curve; `kind` names its style on the page."""

    kind: str
    points: Sequence[CurvePoint]


@dataclass(frozen=True)
class Drawn:
    """One curve as an SVG path."""

    kind: str
    path: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis with its number."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Everything that the page needs to draw a chart and to describe it in words."""

    name: str
    title: str
    words: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Drawn, ...]
    legend: tuple[tuple[str, str], ...]
    """(style, name) of each kind of curve."""


def loss_words(curves: Sequence[LossCurve]) -> str:
    """Describe the losses of all attempts in one sentence; '' if none was measured."""
    series = {
        "training": [point for curve in curves for point in curve.training],
        "held out": [point for curve in curves for point in curve.held_out],
    }
    courses = [_course(name, points) for name, points in series.items() if points]
    return f"Loss in nats per trained token: {'; '.join(courses)}." if courses else ""


def loss_chart(curves: Sequence[LossCurve]) -> Chart | None:
    """Draw training and held-out loss of all attempts; None if none was measured."""
    training = [Curve("training", curve.training) for curve in curves if curve.training]
    held_out = [Curve("held-out", curve.held_out) for curve in curves if curve.held_out]
    lines = [*training, *held_out]
    if not lines:
        return None
    return _chart(
        "loss",
        "Loss",
        loss_words(curves),
        ("optimizer step", "nats per trained token"),
        lines,
        [("training", "training"), ("held-out", "held out")],
    )


def memory_words(curves: Sequence[MemoryCurve]) -> str:
    """Describe the memory of all attempts in one sentence; '' if none was measured."""
    used = [gb for curve in curves for _, gb in curve.process]
    if not used:
        return ""
    predicted = [curve.predicted_gb for curve in curves if curve.predicted_gb is not None]
    budgets = [curve.budget_gb for curve in curves if curve.budget_gb is not None]
    parts = [f"Memory: at most {max(used):.2f} GB in use"]
    parts += [f"predicted {max(predicted):.2f} GB"] if predicted else []
    parts += [f"budget {budgets[-1]:g} GB"] if budgets else []
    return f"{', '.join(parts)}."


def memory_chart(curves: Sequence[MemoryCurve]) -> Chart | None:
    """Draw memory, prediction and budget of all attempts; None if nothing was measured."""
    lines = [Curve("process", curve.process) for curve in curves if curve.process]
    if not lines:
        return None
    for curve in curves:
        for kind, level in (("predicted", curve.predicted_gb), ("budget", curve.budget_gb)):
            if level is not None:
                ends = ((curve.start_minutes, level), (curve.end_minutes, level))
                lines.append(Curve(kind, ends))
    return _chart(
        "memory",
        "Memory",
        memory_words(curves),
        ("minutes (pauses between attempts cut to 1)", "GB (2**30 bytes)"),
        lines,
        [("process", "whole process"), ("predicted", "predicted peak"), ("budget", "budget")],
        from_zero=True,
    )


def _course(name: str, points: Sequence[CurvePoint]) -> str:
    """Return `training from 2.104 to 0.031`, with the lowest value if that is another."""
    first, last = points[0][1], points[-1][1]
    step, low = min(points, key=lambda point: point[1])
    course = f"{name} from {first:.3f} to {last:.3f}"
    return course if low == last else f"{course}, lowest {low:.3f} at step {step:,.0f}"


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

    width = SIZE["width"] - SIZE["left"] - SIZE["right"]
    height = SIZE["height"] - SIZE["top"] - SIZE["bottom"]

    def place(point: CurvePoint) -> CurvePoint:
        x = SIZE["left"] + (point[0] - x_low) / (x_high - x_low) * width
        y = SIZE["top"] + (y_high - point[1]) / (y_high - y_low) * height
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
    path = "M" + "L".join(f"{x:g},{y:g}" for x, y in points)
    return path if len(points) > 1 else f"{path}h0.1"  # with round caps this is a dot


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest value, moved apart if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{value:.6g}") for value in found if low <= value <= high]
