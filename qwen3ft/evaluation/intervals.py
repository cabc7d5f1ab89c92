"""How sure a share is."""

from __future__ import annotations

import math
from statistics import NormalDist


def wilson_interval(share: float, rows: int, confidence: float) -> tuple[float, float]:
    """The interval of a share of `rows` independent questions, within 0 to 1.

    Wilson's score interval (E. B. Wilson, JASA 22, 1927, equation 10), which holds for shares of 0
    and 1 and for few rows too.
    """
    if rows < 1:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    squared = z * z / rows
    middle = (share + squared / 2) / (1 + squared)
    half = z / (1 + squared) * math.sqrt(share * (1 - share) / rows + squared / (4 * rows))
    return max(0.0, middle - half), min(1.0, middle + half)
