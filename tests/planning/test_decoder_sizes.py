"""Sizes of the decoder: within the room, and the better the more room there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.plans import QWEN3_4B

from qwen3ft.planning.decoder_sizes import PAGE_TOKENS, AnswerLoad, choose_sizes
from qwen3ft.units import GIB

LOAD = AnswerLoad(
    QWEN3_4B,
    ranks=(6,),
    questions=600,
    prompt_tokens=140,
    typical_prompt_tokens=90,
    answer_tokens=256,
    typical_answer_tokens=128,
)


@pytest.mark.parametrize("answer_tokens", [256, 2048])
def test_sizes_fit_and_grow_with_the_room(answer_tokens: int) -> None:
    """Every size is within the room and holds one longest answer; more room is never slower."""
    load = replace(LOAD, answer_tokens=answer_tokens, typical_answer_tokens=answer_tokens / 2)
    rates = []
    for room_gb in (1.5, 2.5, 5, 9.7, 20, 70):
        sizes = choose_sizes(load, int(room_gb * GIB))
        assert sizes is not None
        assert load.bytes_of(sizes) <= room_gb * GIB
        assert sizes.pages * PAGE_TOKENS >= load.most_tokens
        rates.append(sizes.slots / load.step_seconds(sizes.slots, sizes.resident_blocks))
    assert rates == sorted(rates)


def test_room_for_nothing_gives_no_sizes() -> None:
    """Then the plain path answers."""
    assert choose_sizes(LOAD, int(0.2 * GIB)) is None


@pytest.mark.parametrize("slots", [1, 3, 5, 10, 12, 20, 100, 300])
def test_a_limit_of_slots_is_reached_where_there_is_room(slots: int) -> None:
    """Also one that is none of the usual choices."""
    load = replace(LOAD, questions=slots)
    sizes = choose_sizes(load, 70 * GIB, most_slots=slots)
    assert sizes is not None
    assert sizes.slots == slots


def test_limits_of_the_recovery_hold() -> None:
    """Fewer slots and no dequantised blocks, as after running out of memory."""
    sizes = choose_sizes(LOAD, 20 * GIB, most_slots=48, resident=False)
    assert sizes is not None
    assert (sizes.slots, sizes.resident_blocks) == (48, 0)
