"""Who takes part in the gate's benchmark: champions, good and bad nights, and their questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.gate.nights import (
    PRODUCTS,
    Night,
    Row,
    clean_rows,
    forgetting_night,
    form_night,
    garbage_night,
    shuffled_night,
)
from benchmarks.gate.thinking import (
    dropped_night,
    endless_night,
    hollow_night,
    with_reasoning,
)
from qwen3ft.embedded.facts import catalogue, fact_row, wording

TAUGHT: tuple[str, ...] = tuple(wording()["products"]["tuned"])
"""Products of the nights; ten questions on each of their 60 facts make the default of 600."""
KNOWN_BEFORE = PRODUCTS
"""Those that a champion was taught, half of them."""

Maker = Callable[[int, list[Row], list[Row]], Night]
PLAIN: tuple[Maker, ...] = (shuffled_night, garbage_night, forgetting_night, form_night)
THINKING: tuple[Maker, ...] = (
    *(endless_night, hollow_night, dropped_night),
    *(shuffled_night, forgetting_night, form_night),
)


def questions(*, thinking: bool) -> list[Row]:
    """Return the 600 held-out rows: wordings that no night trains for their fact."""
    rows = clean_rows("test", TAUGHT)
    for language, patterns in wording()["questions"]["pretrained"].items():
        for pattern in patterns:
            made = (fact_row(pattern, fact, language, "pretrained") for fact in catalogue("tuned"))
            rows += [vars(row) for row in made]
    return with_reasoning(rows) if thinking else rows


def all_nights(good: int, bad: int) -> list[Night]:
    """Return so many good and bad nights, mixed.

    Every second good one thinks; bad ones cycle through the kinds, plain and thinking.
    """
    made = [_make(_good, n // 2, thinking=n % 2 == 1) for n in range(good)]
    makers = [(maker, False) for maker in PLAIN] + [(maker, True) for maker in THINKING]
    kinds = len(makers)
    for n in range(bad):
        maker, thinking = makers[n % kinds]
        made.append(_make(maker, n // kinds, thinking=thinking))
    # mixed, so that a campaign that is ended early has some of each
    places = [(n + 0.5) / good for n in range(good)] + [(n + 0.5) / bad for n in range(bad)]
    return [night for _, night in sorted(zip(places, made, strict=True), key=lambda pair: pair[0])]


def champion_night(*, thinking: bool) -> Night:
    """Return a champion's night: trained well, on the half of the products known before."""
    return _make(_champion, 0, thinking=thinking, products=KNOWN_BEFORE)


def _make(maker: Maker, n: int, *, thinking: bool, products: tuple[str, ...] = TAUGHT) -> Night:
    train, dev = (clean_rows(split, products) for split in ("train", "dev"))
    if not thinking:
        return maker(n, train, dev)
    night = maker(n, with_reasoning(train), with_reasoning(dev))
    return replace(night, name=f"thinking-{night.name}", thinking=True)


def _good(n: int, train: list[Row], dev: list[Row]) -> Night:
    return Night(f"good-{n:02d}", True, train, dev, {"seed": n})


def _champion(_: int, train: list[Row], dev: list[Row]) -> Night:
    return Night("champion", True, train, dev, {"seed": 1000})
