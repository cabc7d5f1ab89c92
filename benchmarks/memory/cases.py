"""What `memory.py` runs: the matrix of cases whose peak is predicted and measured, and the caps.

Data and pure functions, no torch.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from benchmarks.speed.cases import TINY

MICRO_BATCHES = {256: (8, 64), 2048: (2, 16), 8192: (1, 4)}
"""Tokens of a sequence: sequences of a micro-batch, few and many."""

TINY_MICRO_BATCHES = {64: (2, 4)}
"""Of the embedded model, to try the benchmark itself without a GPU."""

MATRIX_SHAPES = ("0.6b", "1.7b", "4b", "8b", "14b")
CAPS_GB = {"4b": (4.0, 6.0, 8.0, 12.0, 13.0), "14b": (12.0, 13.0, 16.0)}
CAP_STEPS = 20
LEAST_SEQUENCES = 4
LEAST_PEERS = ("trl", "unsloth")


@dataclass(frozen=True)
class MatrixCase:
    """One micro-batch of full sequences; all of each block is computed again, or nothing."""

    shape: str
    sequence_tokens: int
    micro_batch_size: int
    recompute: bool

    @property
    def name(self) -> str:
        """Unique among cases."""
        again = "recompute" if self.recompute else "keep all"
        return f"{self.shape} {self.micro_batch_size} x {self.sequence_tokens}, {again}"


def matrix(shapes: tuple[str, ...], seed: int) -> dict[str, list[MatrixCase]]:
    """All cases of each shape, in an order drawn by `seed`: the first that fit are measured."""
    generator = random.Random(seed)
    cases = {}
    for shape in shapes:
        sizes = TINY_MICRO_BATCHES if shape == TINY else MICRO_BATCHES
        cases[shape] = [
            MatrixCase(shape, tokens, micro, recompute)
            for tokens, recompute in itertools.product(sizes, (True, False))
            for micro in sizes[tokens]
        ]
        generator.shuffle(cases[shape])
    return cases
