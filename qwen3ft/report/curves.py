"""The curves of the run card, thinned: loss over steps, memory over minutes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from qwen3ft.records.run_card import CurvePoint, LossCurve, MemoryCurve
from qwen3ft.records.training import TrainingMetrics
from qwen3ft.report.figures import AttemptMemory, attempt_minutes

MOST_POINTS = 200
"""Most points of one curve: about one for every two pixels of a phone."""


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
