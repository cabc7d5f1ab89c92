"""Shapes, cases, suites and the workload of the speed benchmark.

To extend it, add a line to `SUITES`. Shapes come from `qwen3ft.model.shapes`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from qwen3ft.model.shapes import KNOWN_MODELS

SHAPES: dict[str, dict[str, Any]] = {
    model.key: {**model.shape.model_dump(), "max_position_embeddings": 262144, "rms_norm_eps": 1e-6}
    for model in KNOWN_MODELS
}
"""Exact Qwen3 shapes, all with room for long sequences; `TINY` is the embedded model instead, with
its own weights."""

TINY = "tiny"
FIRST_TOKEN, TOKENS = 10, 500
"""Bounds of the drawn token ids, [first, tokens): never padding, and in every vocabulary."""

LORA_RANK, LORA_ALPHA, LEARNING_RATE = 6, 12, 5e-5
"""Adapter and rate of every contestant: all seven projections, no dropout."""


@dataclass(frozen=True)
class Settings:
    """One contestant's split of an optimizer step; `recompute` is gradient checkpointing."""

    micro: int
    accumulate: int = 1
    recompute: bool = True

    def __str__(self) -> str:
        return f"{self.micro} x {self.accumulate}" + ("" if self.recompute else ", keeps all")


@dataclass(frozen=True)
class Case:
    """One workload on one model under one memory cap (GB of 2**30 bytes)."""

    shape: str
    sequence_tokens: int
    cap_gb: float
    lengths: Literal["lognormal", "full"] = "lognormal"
    sequences_per_step: int = 64
    longest_tokens: int = 0
    """Longest sequence, if `sequence_tokens` holds several; 0 if it holds one."""

    @property
    def name(self) -> str:
        """Name that no other case has."""
        kind = "" if self.lengths == "lognormal" else f" full x {self.sequences_per_step}"
        kind += f" of up to {self.longest_tokens}" if self.longest_tokens else ""
        return f"{self.shape} seq {self.sequence_tokens}{kind}, {self.cap_gb:g} GB"

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the workload may have."""
        return self.longest_tokens or self.sequence_tokens


@dataclass(frozen=True)
class Entry:
    """One line of a suite: a contestant, its case and its settings."""

    case: Case
    contestant: str
    settings: Settings

    def describe(self) -> dict[str, Any]:
        """Return the entry as JSON values, with the settings in words."""
        return {
            "case": self.case.name,
            "contestant": self.contestant,
            "settings": str(self.settings),
            **asdict(self.settings),
        }


OURS = ("ours", "ours-plain")
PACKING = ("trl-pack", "trl-liger-pack", "unsloth-pack")
UNSLOTH = ("unsloth", "unsloth-pack")
CONTESTANTS = (*OURS, "hf", "trl", *PACKING, "unsloth")

NEEDS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "ours-plain": (),
    "hf": (),
    "trl": ("trl",),
    "trl-pack": ("trl",),
    "trl-liger-pack": ("trl", "liger_kernel"),
    **dict.fromkeys(UNSLOTH, ("unsloth", "unsloth_zoo")),
}
"""Modules that a contestant needs in addition to the project's own dependencies."""

Table = dict[str, tuple[Settings, ...]]

DESIGN: Table = dict.fromkeys(CONTESTANTS, (Settings(4, 16),))
"""Batch 4 x accumulation 16 for everyone; packing peers batch rows of `sequence_tokens`."""

_ROWS = 28  # packed rows of 256 that hold about 64 sequences
BEST: Table = {
    "ours": (Settings(64),),
    "ours-plain": (Settings(64),),
    "hf": (Settings(4, 16),),
    "trl": (Settings(64),),
    "trl-pack": (Settings(_ROWS),),
    "trl-liger-pack": (Settings(_ROWS),),
    "unsloth": (Settings(64),),
    "unsloth-pack": (Settings(_ROWS),),
}
"""Best settings found for each under 13 GB; for ours the most that its plan may use."""

LEAN: Table = {
    **BEST,
    "hf": (Settings(1, 64),),
    "trl": (Settings(16, 4),),
    "trl-pack": (Settings(14, 2),),
    "trl-liger-pack": (Settings(14, 2), Settings(_ROWS)),
    "unsloth": (Settings(64), Settings(32, 2)),
}
ROOMY: Table = {
    **BEST,
    "hf": (Settings(16, 4),),
    "trl": (Settings(64), Settings(64, recompute=False)),
    "trl-pack": (Settings(_ROWS), Settings(_ROWS, recompute=False)),
    "trl-liger-pack": (Settings(_ROWS), Settings(_ROWS, recompute=False)),
    "unsloth": (Settings(64), Settings(64, recompute=False)),
}
LARGE: Table = {
    **{name: (Settings(64),) for name in OURS},
    **{name: (Settings(4, 16),) for name in ("trl", "trl-pack", "unsloth")},
}

_PUBLISHED = Case("4b", 2048, 13, sequences_per_step=150, longest_tokens=256)
"""What 8 packed rows of 2,048 tokens hold of the design's sequences."""

_NO_CAP_GB = 120.0  # nothing comes near it

PUBLISHED: Table = {
    **{name: (Settings(_PUBLISHED.sequences_per_step),) for name in OURS},
    **{
        name: (Settings(8), Settings(2, 4))
        for name in ("trl-pack", "trl-liger-pack", "unsloth-pack")
    },
}
"""Unsloth's own best published settings for one GPU: rows of 2,048 packed tokens, batch 8."""

PUBLISHED_NO_CAP: Table = {
    **PUBLISHED,
    **{
        name: (Settings(8), Settings(8, recompute=False), Settings(2, 4))
        for name in ("trl-pack", "unsloth-pack")
    },
}
LONG: Table = {name: (Settings(1),) for name in (*OURS, "trl", "unsloth")}


def _long(tokens: int) -> Case:
    return Case("4b", tokens, 13, lengths="full", sequences_per_step=1)


_4B = Case("4b", 256, 13)
SUITES: dict[str, tuple[tuple[Case, Table], ...]] = {
    "design": ((_4B, DESIGN),),
    "capped": ((_4B, BEST),),
    "lean": ((replace(_4B, cap_gb=6), LEAN),),
    "roomy": ((replace(_4B, cap_gb=80), ROOMY),),
    "published": ((_PUBLISHED, PUBLISHED),),
    "published-no-cap": ((replace(_PUBLISHED, cap_gb=_NO_CAP_GB), PUBLISHED_NO_CAP),),
    "long": tuple((_long(tokens), LONG) for tokens in (16384, 32768, 65536)),
    "14b": ((replace(_4B, shape="14b"), LARGE),),
    "8b": ((replace(_4B, shape="8b"), {**BEST, "trl": (Settings(16, 4),)}),),
    "1.7b": ((replace(_4B, shape="1.7b"), BEST),),
    "0.6b": ((replace(_4B, shape="0.6b"), BEST),),
    TINY: (
        (Case(TINY, 64, 4, sequences_per_step=8), dict.fromkeys(CONTESTANTS, (Settings(4, 2),))),
    ),
}
"""Cases of each suite, with the settings of every contestant that runs them."""


def parse_case(text: str) -> tuple[Case, Settings | None]:
    """Parse `SHAPE:SEQ:CAP[:full][:MxA]`, such as 4b:256:13 or 8b:8192:24:full:1x1.

    Without MxA the settings are those of `BEST` (one sequence at a time where lengths are full).

    Raises:
        ValueError: The text has another form, or names an unknown shape.
    """
    parts = text.lower().split(":")
    if len(parts) < 3 or parts[0] not in {*SHAPES, TINY}:
        raise ValueError(f"{text!r} is not SHAPE:SEQ:CAP; shapes: {', '.join([*SHAPES, TINY])}")
    full = "full" in parts[3:]
    split = next((part for part in parts[3:] if "x" in part), "1x1" if full else "")
    micro, _, accumulate = split.partition("x")
    settings = Settings(int(micro), int(accumulate)) if split else None
    sequences = settings.micro * settings.accumulate if settings else 64
    lengths: Literal["lognormal", "full"] = "full" if full else "lognormal"
    return Case(parts[0], int(parts[1]), float(parts[2]), lengths, sequences), settings


def select(suites: list[str], cases: list[str], contestants: list[str] | None) -> Iterator[Entry]:
    """Yield the requested entries, case by case."""
    chosen = [pair for suite in suites for pair in SUITES[suite]]
    for text in cases:
        case, settings = parse_case(text)
        table: Table = dict.fromkeys(CONTESTANTS, (settings,)) if settings else BEST
        chosen.append((case, table))
    for case, table in chosen:
        for contestant in contestants or table:
            yield from (Entry(case, contestant, each) for each in table.get(contestant, ()))


def rows_needed(entry: Entry, steps: int) -> int:
    """Return how many rows `steps` optimizer steps take; packing peers get a tenth to spare."""
    if entry.contestant not in PACKING:
        return entry.case.sequences_per_step * steps
    mean = entry.case.longest * (0.42 if entry.case.lengths == "lognormal" else 1.0)
    slots = entry.settings.micro * entry.settings.accumulate * entry.case.sequence_tokens * steps
    return max(entry.case.sequences_per_step * steps, math.ceil(1.1 * slots / mean))


def workload(case: Case, rows: int, seed: int) -> list[list[int]]:
    """Return the first `rows` rows of token ids; a contestant that needs more gets the same first.

    Lengths are lognormal with median 0.375 x the longest and sigma 0.6, clipped to 16 and the
    longest; or all are the longest. Every token is trained.
    """
    return list(islice(_rows(case, random.Random(seed)), rows))


def _rows(case: Case, generator: random.Random) -> Iterator[list[int]]:
    limit = case.longest
    while True:
        length = limit
        if case.lengths == "lognormal":
            length = int(
                min(limit, max(16, generator.lognormvariate(math.log(0.375 * limit), 0.6)))
            )
        yield [generator.randrange(FIRST_TOKEN, TOKENS) for _ in range(length)]


def typical_step(case: Case, steps: int, seed: int) -> list[int]:
    """Return the lengths of the step whose token count is nearest to the mean."""
    size = case.sequences_per_step
    lengths = [len(row) for row in workload(case, size * steps, seed)]
    groups = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    mean = sum(lengths) / len(groups)
    return min(groups, key=lambda group: abs(sum(group) - mean))


@dataclass(frozen=True)
class Job:
    """One contestant's training, as its process receives it."""

    entry: Entry
    steps: int
    warmup: int
    seed: int
    snapshot: dict[str, Any]
    folder: Path
    started: float

    @classmethod
    def read(cls, values: dict[str, Any]) -> Job:
        """Return the job that JSON values describe."""
        entry = values["entry"]
        settings = Settings(*(entry[name] for name in ("micro", "accumulate", "recompute")))
        return cls(
            Entry(Case(**values["case"]), entry["contestant"], settings),
            **{name: values[name] for name in ("steps", "warmup", "seed", "snapshot", "started")},
            folder=Path(values["folder"]),
        )

    def rows(self) -> list[list[int]]:
        """Return as much of the workload as the contestant needs."""
        return workload(self.entry.case, rows_needed(self.entry, self.steps), self.seed)
