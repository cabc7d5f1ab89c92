"""The curves of the run card: loss over steps, memory over minutes; thinned, drawn, and in words.

The page styles the SVG paths and ticks, so charts follow its theme and text size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qwen3ft.records.run_card import CurvePoint, LossCurve, MemoryCurve
from qwen3ft.records.training import TrainingMetrics
from qwen3ft.report.figures import AttemptMemory, attempt_minutes

MOST_POINTS = 200
"""Most points of one curve: about one for every two pixels of a phone."""

SIZE = {"width": 640, "height": 300, "left": 64, "right": 24, "top": 14, "bottom": 52}
"""Size and margins in view box units: about pixels on a phone held upright."""

_NAMES = {
    "training": "training",
    "held-out": "held out",
    "process": "whole process",
    "predicted": "predicted peak",
    "budget": "budget",
}

_Curve = tuple[str, Sequence[CurvePoint]]
"""(style on the page, points)."""


class Tick(NamedTuple):
    """A place on an axis with its number."""

    at: float
    text: str


class Chart(NamedTuple):
    """Everything that the page needs to draw a chart and to describe it in words."""

    title: str
    words: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    paths: list[tuple[str, str]]
    """(style, SVG path) of each curve."""
    legend: list[tuple[str, str]]
    """(style, name) of each kind of curve."""


def loss_curve(attempt: int, lines: Sequence[TrainingMetrics]) -> LossCurve:
    """Return the training and held-out losses of an attempt's metrics."""
    training = ((line.step, line.loss) for line in lines)
    held_out = ((line.step, line.held_out_loss) for line in lines)
    return LossCurve(attempt=attempt, training=thin(training), held_out=thin(held_out))


def memory_curves(attempts: Sequence[AttemptMemory]) -> tuple[MemoryCurve, ...]:
    """Return the memory of each attempt on a common time axis without long pauses."""
    curves = []
    for attempt, (start, end) in zip(attempts, attempt_minutes(attempts), strict=True):
        used_gb = (sample.process_gb for sample in attempt.samples)
        process = zip(attempt.minutes(start), used_gb, strict=True)
        curves.append(
            MemoryCurve(
                attempt=attempt.number,
                start_minutes=round(start, 4),
                end_minutes=round(end, 4),
                predicted_gb=attempt.predicted_gb if attempt.predicted else None,
                budget_gb=attempt.budget_gb,
                process=thin(process),
            )
        )
    return tuple(curves)


def thin(
    points: Iterable[tuple[float, float | None]], most: int = MOST_POINTS
) -> tuple[CurvePoint, ...]:
    """Return at most `most` (an even number) of the finite points, in order."""
    finite = [
        (float(f"{x:.6g}"), float(f"{y:.6g}"))
        for x, y in points
        if y is not None and math.isfinite(x) and math.isfinite(y)
    ]
    if len(finite) <= most:
        return tuple(finite)
    # lowest and highest point of each stretch: an average would flatten spikes
    stretches, kept = most // 2, []
    for number in range(stretches):
        start, end = (len(finite) * part // stretches for part in (number, number + 1))
        indices = range(start, end)
        extremes = {
            min(indices, key=lambda i: finite[i][1]),
            max(indices, key=lambda i: finite[i][1]),
        }
        kept += [finite[index] for index in sorted(extremes)]
    return tuple(kept)


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
    # each step is in one attempt only, so the points of all are one curve
    training = [point for curve in curves for point in curve.training]
    held_out = [point for curve in curves for point in curve.held_out]
    drawn: list[_Curve] = [("training", training), ("held-out", held_out)]
    drawn = [(kind, points) for kind, points in drawn if points]
    labels = ("optimizer step", "nats per trained token")
    return _chart("Loss", loss_words(curves), labels, drawn) if drawn else None


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
    drawn: list[_Curve] = [("process", curve.process) for curve in curves if curve.process]
    if not drawn:
        return None
    for curve in curves:
        for kind, level in (("predicted", curve.predicted_gb), ("budget", curve.budget_gb)):
            if level is not None:
                drawn.append((kind, [(curve.start_minutes, level), (curve.end_minutes, level)]))
    labels = ("minutes (pauses between attempts cut to 1)", "GB (2**30 bytes)")
    return _chart("Memory", memory_words(curves), labels, drawn, from_zero=True)


def _course(name: str, points: Sequence[CurvePoint]) -> str:
    """Return `training from 2.104 to 0.031`, with the lowest value if that is another."""
    first, last = points[0][1], points[-1][1]
    step, low = min(points, key=lambda point: point[1])
    course = f"{name} from {first:.3f} to {last:.3f}"
    return course if low == last else f"{course}, lowest {low:.3f} at step {step:,.0f}"


def _chart(
    title: str,
    words: str,
    labels: tuple[str, str],
    curves: Sequence[_Curve],
    *,
    from_zero: bool = False,
) -> Chart:
    points = [point for _, curve in curves for point in curve]
    x_low, x_high = _bounds([x for x, _ in points])
    y_low, y_high = _bounds([y for _, y in points])
    y_low, y_high = (0.0, 1.05 * y_high) if from_zero else (y_low, y_high)
    width = SIZE["width"] - SIZE["left"] - SIZE["right"]
    height = SIZE["height"] - SIZE["top"] - SIZE["bottom"]

    def place(x: float, y: float) -> CurvePoint:
        from_left = SIZE["left"] + (x - x_low) / (x_high - x_low) * width
        from_top = SIZE["top"] + (y_high - y) / (y_high - y_low) * height
        return round(from_left, 1), round(from_top, 1)

    kinds = {kind for kind, _ in curves}
    return Chart(
        title,
        words,
        *labels,
        x_ticks=[Tick(place(x, y_low)[0], f"{x:g}") for x in _ticks(x_low, x_high)],
        y_ticks=[Tick(place(x_low, y)[1], f"{y:g}") for y in _ticks(y_low, y_high)],
        paths=[(kind, _path([place(*point) for point in curve])) for kind, curve in curves],
        legend=[(kind, name) for kind, name in _NAMES.items() if kind in kinds],
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
