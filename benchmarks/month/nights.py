"""The month's nights: the files of the data source and the faults of each night, drawn by a seed.

The source writes one file per night into the data folder:

- good: right rows about a new product; about four products the first time
- malformed: the same, mixed with lines that are not rows
- shuffled, garbage, language: all rows so far again, with answers of other questions, of random
  words, or in another language
- truncated: more broken lines than a run may quarantine
- nothing: no file

The source removes a bad file before the next night.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Literal

from benchmarks.gate.nights import (
    Row,
    clean_rows,
    garbled,
    in_another_language,
    shuffled,
    write_rows,
)
from qwen3ft.embedded.facts import wording

Kind = Literal["good", "malformed", "shuffled", "garbage", "language", "truncated", "nothing"]

GOOD: tuple[Kind, ...] = ("good", "malformed")
BAD: tuple[Kind, ...] = ("shuffled", "garbage", "language", "truncated")
TRAINED: tuple[Kind, ...] = (*GOOD, "shuffled", "garbage", "language")
EVERY: tuple[Kind, ...] = (*TRAINED, "truncated", "nothing")

MOST_NIGHTS = 30
GOOD_SHARE, BAD_SHARE = 0.3, 0.3
FIRST_PRODUCTS = 4
"""Products of the first night; with fewer, other answers of the test lose too much likelihood."""

CRASHES = ("kill flow", "power cut", "kill at promotion", "kill server")
"""Faults of which a night gets one at most. A run that crashes twice is left to a person or to the
next night, and a restarted server reports a crash in a run's first five minutes 15 minutes late."""

FAULTS_A_NIGHT = 0.5
HOUR = 2
"""UTC hour at which a night starts."""

MALFORMED = ('{"question": "cut o', "not a row at all", '{"question": "", "answer": "blue"}')
TRUNCATED_LINES = 1000
"""Broken lines of a truncated file: more than a run may quarantine of a whole month's rows."""


MACHINE_OFF, TRACKING_DOWN = "machine off", "tracking down"
UNDONE = (MACHINE_OFF, TRACKING_DOWN)
"""Faults that leave a good night undone, once a month each; the next night brings no data and
has to catch up."""

STRIKES: dict[str, tuple[Kind, ...]] = {
    "kill training": TRAINED,
    "kill flow": TRAINED,
    "full disk": GOOD,
    "double start": EVERY,
    "out of memory": TRAINED,
    "kill server": TRAINED,
    "kill at promotion": GOOD,
    "kill worker": TRAINED,
    "nan": TRAINED,
    "second start": EVERY,
    "power cut": TRAINED,
    "tracking hangs": TRAINED,
}
"""The other faults, with the kinds of nights that they can strike."""


@dataclass(frozen=True)
class Strike:
    """One planned fault: its name, and the training progress (0 to 1) at which it strikes."""

    name: str
    at: float


@dataclass
class Night:
    """One night of the month.

    Attributes:
        number: Number, from 1.
        hour: Time at which its run is due.
        kind: Kind of the data source's file.
        undone: Fault that leaves the night undone; empty if there is none.
        catches_up: Whether the night before was left undone.
        strikes: Other faults.
    """

    number: int
    hour: datetime
    kind: Kind
    undone: str = ""
    catches_up: bool = False
    strikes: list[Strike] = field(default_factory=list)

    @property
    def date(self) -> str:
        """Date as YYYY-MM-DD."""
        return f"{self.hour:%Y-%m-%d}"

    @property
    def faults(self) -> tuple[str, ...]:
        """Names of all faults of the night."""
        return (*((self.undone,) if self.undone else ()), *(s.name for s in self.strikes))


def plan_month(nights: int, seed: int, today: datetime | None = None) -> list[Night]:
    """Plan so many nights, the last one today: the first is good, the others in random order."""
    random = Random(f"month {seed}")
    blocks = _blocks(nights)
    first, rest = blocks[0], blocks[1:]
    random.shuffle(rest)
    days = [day for block in (first, *rest) for day in block]
    last = (today or datetime.now(UTC)).replace(hour=HOUR, minute=0, second=0, microsecond=0)
    planned = [
        Night(
            number=number,
            hour=last - timedelta(days=nights - number),
            kind=kind,
            undone=undone,
            catches_up=number > 1 and bool(days[number - 2][1]),
        )
        for number, (kind, undone) in enumerate(days, 1)
    ]
    _strike(random, planned)
    return planned


def _blocks(nights: int) -> list[list[tuple[Kind, str]]]:
    """Return blocks of consecutive nights as (kind, undone); the first block is the first night."""
    good = max(1, round(GOOD_SHARE * nights))
    bad = round(BAD_SHARE * nights)
    nothing = nights - good - bad
    blocks: list[list[tuple[Kind, str]]] = [[("good", "")]]
    if nights >= 10:  # long enough for both pairs
        blocks += [[("good", undone), ("nothing", "")] for undone in UNDONE]
        good, nothing = good - len(UNDONE), nothing - len(UNDONE)
    good_kinds = [("malformed" if n % 3 == 2 else "good") for n in range(1, good)]
    bad_kinds = [BAD[n % len(BAD)] for n in range(bad)]
    kinds: list[Kind] = [*good_kinds, *bad_kinds, *("nothing" for _ in range(nothing))]  # type: ignore[list-item]
    return blocks + [[(kind, "")] for kind in kinds]


def _strike(random: Random, nights: list[Night]) -> None:
    """Assign the faults in turn to nights that they can strike, two per night at most."""
    turn = list(STRIKES)
    random.shuffle(turn)
    open_nights = [night for night in nights if not night.undone and not night.catches_up]
    for number in range(round(FAULTS_A_NIGHT * len(nights))):
        name = turn[number % len(turn)]
        able = [night for night in open_nights if night.kind in STRIKES[name]]
        able = [night for night in able if len(night.strikes) < 2 and name not in night.faults]
        if name in CRASHES:
            able = [night for night in able if not set(CRASHES) & set(night.faults)]
        if able:
            chosen = random.choice(able)
            chosen.strikes.append(Strike(name, round(random.uniform(0.3, 0.9), 2)))


def products_of(nights: list[Night]) -> list[str]:
    """Return the products that the good nights bring, in order."""
    good = sum(night.kind in GOOD for night in nights)
    products: list[str] = wording()["products"]["tuned"]
    return products[: FIRST_PRODUCTS - 1 + good]


class Source:
    """The writer of the data: one file per night, and line counts for the checks.

    Args:
        folder: The data folder.
        dev: File of the held-out rows for early stopping, about the products so far. With others
            their loss would rise from the start, and the best checkpoint would be the first.
        products: Products that good nights bring, in order.
        seed: Seed of the spoiled answers.
    """

    def __init__(self, folder: Path, dev: Path, products: list[str], seed: int) -> None:
        self.folder = folder
        self.dev = dev
        self.seed = seed
        self._coming = list(products)
        self._known: list[str] = []
        self._bad: Path | None = None
        self.lines: dict[str, tuple[int, int]] = {}
        """Number of lines and of broken lines in each file, by its name."""

    def write(self, night: Night) -> None:
        """Write the file of the night."""
        self.folder.mkdir(exist_ok=True)
        if self._bad is not None:
            self._bad.unlink()
            del self.lines[self._bad.name]
            self._bad = None
        if night.kind == "nothing":
            return
        random = Random(f"source {self.seed} {night.number}")
        path = self.folder / f"night-{night.number:02d}.jsonl"
        rows = self._rows(night.kind, random)
        broken = {"malformed": 3, "truncated": TRUNCATED_LINES}
        self._write_file(path, rows, broken.get(night.kind, 0), random)
        write_rows(self.dev, clean_rows("dev", self._known))
        if night.kind in BAD:
            self._bad = path

    def totals(self) -> tuple[int, int]:
        """Return the number of lines in all current files, and of broken ones among them."""
        counts = self.lines.values()
        dev_lines = len(self.dev.read_text(encoding="utf-8").splitlines())
        return dev_lines + sum(lines for lines, _ in counts), sum(broken for _, broken in counts)

    def _rows(self, kind: Kind, random: Random) -> list[Row]:
        if kind in GOOD:
            count = 1 if self._known else FIRST_PRODUCTS
            new, self._coming = self._coming[:count], self._coming[count:]
            self._known += new
            return clean_rows("train", new)
        rows = self._known_rows()
        if kind == "shuffled":
            return shuffled(rows, random)
        if kind == "garbage":
            return garbled(rows, random)
        return in_another_language(rows) if kind == "language" else []

    def _known_rows(self) -> list[Row]:
        return clean_rows("train", self._known) if self._known else []

    def _write_file(self, path: Path, rows: list[Row], broken: int, random: Random) -> None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        for number in range(
            broken
        ):  # make each line unique: repeated lines would count as duplicates
            line = MALFORMED[number % len(MALFORMED)].replace("cut o", f"cut o{number}")
            lines.insert(random.randrange(len(lines) + 1), line)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.lines[path.name] = (len(lines), broken)
