"""The curves of a run's card: loss over steps, memory over minutes; thinned, and as a line of text.

Guarantees: pure; what is not finite is left out; the highest and lowest points of a curve survive
thinning, because they are what one looks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from qwen3ft.records.run_card import CurvePoint, LossCurve, MemoryCurve
from qwen3ft.records.training import TrainingMetrics
from qwen3ft.report.figures import AttemptMemory, attempt_minutes

MOST_POINTS = 200
"""Of one curve: about two for each pixel that a phone has to draw it."""

_BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_CHARACTERS = 24


def loss_curve(attempt: int, lines: Sequence[TrainingMetrics]) -> LossCurve:
    """The losses that an attempt's metrics hold."""
    training = ((line.step, line.loss) for line in lines)
    held_out = ((line.step, line.held_out_loss) for line in lines)
    return LossCurve(attempt=attempt, training=thin(training), held_out=thin(held_out))


def memory_curves(attempts: Sequence[AttemptMemory]) -> tuple[MemoryCurve, ...]:
    """The memory of each attempt, one after the other; long pauses between them are cut."""
    curves = []
    for attempt, (start, end) in zip(attempts, attempt_minutes(attempts), strict=True):
        process = (
            (start + (sample.timestamp - attempt.started).total_seconds() / 60, sample.process_gb)
            for sample in attempt.samples
        )
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
    """The finite points, at most `most` (an even number): lowest and highest of each stretch."""
    finite = [
        (float(f"{x:.6g}"), float(f"{y:.6g}"))
        for x, y in points
        if y is not None and math.isfinite(x) and math.isfinite(y)
    ]
    if len(finite) <= most:
        return tuple(finite)
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


def sparkline(values: Sequence[float]) -> str:
    """`▇▅▃▂▁`: the values as bars between their lowest and highest; '' for fewer than two."""
    if len(values) < 2:
        return ""
    step = max(1.0, (len(values) - 1) / (SPARKLINE_CHARACTERS - 1))
    count = min(len(values), SPARKLINE_CHARACTERS)
    chosen = [values[min(len(values) - 1, round(step * index))] for index in range(count)]
    low, high = min(chosen), max(chosen)
    if high == low:
        return _BARS[0] * count
    return "".join(
        _BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] for value in chosen
    )
