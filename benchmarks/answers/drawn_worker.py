"""A worker process whose answers end at drawn lengths, since a random model ends hardly any.

It does what `python -m qwen3ft.worker` does. Each answer's limit is drawn below the one that it was
given, as `cases.draw_length` does, in the order in which the answers are asked for.
"""

from __future__ import annotations

import random
import runpy
from dataclasses import replace
from typing import Any

from benchmarks.answers.cases import draw_length

SEED = 0


def _draw_limits() -> None:
    """Have the questions of a test answered within drawn limits."""
    from qwen3ft.decoding import writing

    make, draw = writing.AnswerLimits, random.Random(SEED)

    def drawn(*args: Any, **named: Any) -> writing.AnswerLimits:
        limits = make(*args, **named)
        return replace(limits, answer_tokens=draw_length(draw, limits.answer_tokens))

    writing.AnswerLimits = drawn  # type: ignore[assignment, misc]


if __name__ == "__main__":
    _draw_limits()
    runpy.run_module("qwen3ft.worker", run_name="__main__", alter_sys=True)
