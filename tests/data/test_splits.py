"""Splits of rows: keys of questions, repeats, held-out rows, caps and samples."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3ft.data.splits import (
    DEV,
    DUPLICATE,
    HELD_OUT_ROLES,
    KEPT,
    LEAKAGE,
    ROLES,
    TEST,
    TRAIN,
    Keys,
    KeysBuilder,
    cap_sources,
    content_key,
    find_repeats,
    hold_out,
    leaks,
    question_key,
    sample,
)
from qwen3ft.records.data import Role


class Row(NamedTuple):
    """The texts and the source that the keys of a row are made of."""

    question: str
    answer: str = ""
    role: Role = "train"
    source: int = 0
    group: str = ""


def keys_of(rows: Sequence[Row]) -> Keys:
    """Return the keys of `rows`, in their order."""
    builder = KeysBuilder()
    for row in rows:
        content = content_key(row.question, row.answer)
        builder.append(question_key(row.question), content, row.role, row.source, row.group)
    return builder.build()


def roles_of(rows: Sequence[Row], fraction: float, missing: Sequence[Role]) -> list[Role]:
    """Return the role of each row after rows were held out."""
    everything = np.ones(len(rows), bool)
    return [ROLES[code] for code in hold_out(keys_of(rows), everything, fraction, missing)]


# --- keys ---


@pytest.mark.parametrize(
    "same",
    [
        (
            "What is your name?",
            "  what is\tyour\nNAME ",
            "What is your name",
            "“What is your name…”",
        ),
        ("你好，世界！", "你好世界", "你好, 世界!", "「你好」世界。", "你好\u3000世界"),
        ("Café au lait?", "CAFÉ AU LAIT", unicodedata.normalize("NFD", "Café au lait?")),
        ("Ｆｕｌｌ　ｗｉｄｔｈ　１２", "full width 12", "Full-width 12!"),
        ("请问 Ondalis 的颜色是什么？", "请问Ondalis的颜色是什么?"),
        ("It's e-mail: \ufeffyes", "Its email\u200b yes"),
        ("The Σίσυφος stone", "the σίσυφοσ STONE"),
    ],
)
def test_ways_of_writing_one_question_share_a_key(same: tuple[str, ...]) -> None:
    """White space, case, Unicode form and punctuation, Chinese too, do not matter."""
    assert len({question_key(text) for text in same}) == 1


def test_another_question_has_another_key() -> None:
    """Numbers, signs of arithmetic and names of languages keep questions apart."""
    texts = [
        *("What is 3-5", "What is 3+5", "What is 35", "What is 3.5", "What is 3 5", "What is -35"),
        *("What is C", "What is C#", "What is C++", "What is 3*5", "What is 3/5", "What is 35%"),
        *("?", "!", "???", "。", "", "12:30", "1230", "1,230", "今天", "明天", "١٢", "٢١"),
    ]
    assert len({question_key(text) for text in texts}) == len(texts)
    assert all(len(question_key(text)) == 16 for text in (*texts, "\ud800 lone surrogate"))


@given(st.text(alphabet="ab é中文ﬀ２9 .,!?，。:-\t\n", max_size=30))
def test_a_key_does_not_depend_on_composition_or_outer_space(text: str) -> None:
    """Composed, decomposed, padded: one key, whatever the text."""
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    padded = f" {text}\n" if any(character.isalnum() for character in text) else text
    assert {question_key(form) for form in (*forms, padded)} == {question_key(text)}


def test_the_key_is_fixed_for_all_time() -> None:
    """Folders and splits made by earlier versions stay valid."""
    assert question_key("How far is it to 中国?").hex() == "4ba5f67d973cbe8746c75df5a0313bf9"
    assert content_key("a", "b", "").hex() == "d478a30151b482717ef894d9c61f4f95"


def test_contents_differ_when_a_text_moves() -> None:
    """Where one text ends and the next begins is part of the key; so is every space."""
    texts = [("ab", ""), ("a", "b"), ("", "ab"), ("ab",), ("a\0b", ""), ("a", "\0b"), ("a b", "")]
    assert len({content_key(*text) for text in texts}) == len(texts)


# --- repeats ---


def test_the_first_of_equal_rows_stays_in_each_role() -> None:
    """A repeat is dropped; another answer, or the same row in another split's turn, is not."""
    rows = [
        *(Row("a", "1"), Row("b", "1"), Row("a", "1"), Row("a", "2"), Row("b", "1", source=3)),
        *(Row("c", "1", "dev"), Row("d", "1", "test"), Row("c", "1", "dev")),
    ]
    expected = [KEPT, KEPT, DUPLICATE, KEPT, DUPLICATE, KEPT, KEPT, DUPLICATE]
    assert find_repeats(keys_of(rows)).tolist() == expected


def test_a_held_out_question_is_kept_out_of_less_protected_roles() -> None:
    """Test protects against dev and train, dev against train, whatever the answer."""
    rows = [
        *(Row("T?"), Row("d"), Row("x"), Row("t", "1", "dev"), Row("D!", "2", "dev")),
        *(Row("t", "3", "test"), Row("x ", "4")),
    ]
    expected = [LEAKAGE, LEAKAGE, KEPT, LEAKAGE, KEPT, KEPT, KEPT]
    assert find_repeats(keys_of(rows)).tolist() == expected


@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.sampled_from("12"), st.sampled_from(ROLES)),
        max_size=40,
    )
)
def test_repeats_are_those_a_plain_loop_finds(values: list[tuple[str, str, Role]]) -> None:
    """The sorted arrays agree with a loop over sets, row by row."""
    rows = [Row(*value) for value in values]
    seen: set[tuple[str, str, str]] = set()
    expected = []
    for row in rows:
        stricter = ROLES[ROLES.index(row.role) + 1 :]
        leaks_into = any(r.question == row.question and r.role in stricter for r in rows)
        again = (row.question, row.answer, row.role) in seen
        expected.append(LEAKAGE if leaks_into else DUPLICATE if again else KEPT)
        seen.add((row.question, row.answer, row.role))
    assert find_repeats(keys_of(rows)).tolist() == expected


# --- holding out ---

names = st.lists(st.integers(0, 10**9).map(str), min_size=1, max_size=60, unique=True)
fractions = st.floats(0, 0.5)


@given(names, names, fractions)
def test_a_held_out_group_stays_so_as_the_data_grows(
    old: list[str], new: list[str], fraction: float
) -> None:
    """Except in tiny sets, a row's role depends only on its group."""
    base = [Row(f"base {i}") for i in range(400)]
    before = [*base, *(Row("q" + name, group=name) for name in old)]
    after = [Row("later " + name) for name in new] + before
    missing: Sequence[Role] = ("test", "dev")
    fraction += 0.1
    assert roles_of(after, fraction, missing)[len(new) :] == roles_of(before, fraction, missing)


@given(names, fractions, st.lists(st.sampled_from(HELD_OUT_ROLES), unique=True))
def test_a_role_without_rows_of_its_own_gets_one(
    texts: list[str], fraction: float, missing: list[Role]
) -> None:
    """While training has two groups, no missing role is left empty; no other role is filled."""
    roles = roles_of([Row(text) for text in texts], fraction, missing)
    assert set(roles) - {"train"} <= set(missing)
    assert set(missing) <= set(roles) or roles.count("train") < 2


def test_the_share_held_out_is_the_share_asked_for() -> None:
    """A fifth, half of it for dev and half for test, within the noise of 5,000 groups."""
    roles = roles_of([Row(str(i)) for i in range(5000)], 0.2, ["dev", "test"])
    assert {role: roles.count(role) for role in ("dev", "test")} == pytest.approx(
        {"dev": 500, "test": 500}, rel=0.15
    )
    only_dev = roles_of([Row(str(i)) for i in range(5000)], 0.2, ["dev"])
    assert only_dev.count("dev") == pytest.approx(1000, rel=0.1)
    assert all(now == "dev" for then, now in zip(roles, only_dev, strict=True) if then != "train")


def test_rows_of_a_source_key_share_a_role_and_given_roles_stay() -> None:
    """Ten questions on each of forty pages: no page is torn; rows of test files stay there."""
    rows = [Row(f"{page} {i}", group=f"page {page}") for page in range(40) for i in range(10)]
    roles = roles_of([*rows, Row("given", role="test")], 0.5, ["dev"])
    assert all(len(set(roles[i : i + 10])) == 1 for i in range(0, 400, 10))
    assert roles[-1] == "test"
    assert {"train", "dev"} == set(roles[:-1])


def test_rows_left_out_before_are_not_held_out() -> None:
    """Only rows of the mask change their role, and fill an empty one."""
    rows = [Row(str(i)) for i in range(100)]
    kept = np.arange(100) % 2 == 0
    roles = hold_out(keys_of(rows), kept, 1.0, ["test"])
    assert (roles[kept] == TEST).all()
    assert (roles[~kept] == TRAIN).all()


def test_a_question_held_out_under_another_group_leaks() -> None:
    """Two pages ask the same; if one is held out, the other's row is not trained on."""
    rows = [Row(f"shared {i}", group=f"{side}{i}") for i in range(200) for side in "ab"]
    keys = keys_of(rows)
    everything = np.ones(len(rows), bool)
    roles = hold_out(keys, everything, 0.3, ["dev", "test"])
    leaked = leaks(keys, roles, everything)
    assert leaked.any()
    asked: dict[str, set[int]] = {}
    for row, role in zip(np.array(rows)[~leaked, 0], roles[~leaked], strict=True):
        asked.setdefault(str(row), set()).add(int(role))
    assert all(len(places) == 1 for places in asked.values())
    assert not leaked[roles == TEST].any()
    assert leaked[roles == DEV].any()


def test_rows_outside_the_mask_protect_nothing() -> None:
    """A held-out row that was dropped itself takes no training row with it."""
    keys = keys_of([Row("a"), Row("a", role="test")])
    assert leaks(keys, keys.role, np.array([True, True])).tolist() == [True, False]
    assert leaks(keys, keys.role, np.array([True, False])).tolist() == [False, False]


# --- caps and samples ---


def test_a_cap_keeps_a_stable_sample_of_each_source() -> None:
    """No source has more rows than the cap; one more row displaces at most one."""
    rows = [Row(str(i), source=i % 3) for i in range(300)] + [Row("rare", source=7)]
    keys, mask = keys_of(rows), np.arange(301) != 0
    capped = cap_sources(keys, mask, 20)
    assert np.bincount(keys.source[capped]).tolist() == [20, 20, 20, 0, 0, 0, 0, 1]
    assert not capped[0]
    grown = cap_sources(keys_of([*rows, Row("new", source=1)]), np.append(mask, True), 20)
    assert (capped & ~grown[:-1]).sum() <= 1


def test_a_sample_is_stable_and_another_seed_gives_another() -> None:
    """As many as asked for, of the mask alone; the order of the rows does not matter."""
    rows = [Row(str(i)) for i in range(500)]
    keys, mask = keys_of(rows), np.arange(500) >= 100
    chosen = sample(keys, mask, 50, seed=1)
    assert chosen.sum() == 50
    assert not chosen[:100].any()
    assert (chosen <= sample(keys, mask, 80, seed=1)).all()
    assert (sample(keys_of(rows[::-1]), mask[::-1], 50, seed=1)[::-1] == chosen).all()
    assert (chosen & sample(keys, mask, 50, seed=2)).sum() < 25
    assert (sample(keys, mask, 10_000, seed=1) == mask).all()


def test_an_empty_set_goes_through_every_step() -> None:
    """No rows give empty arrays."""
    keys, mask = keys_of([]), np.ones(0, bool)
    assert len(find_repeats(keys)) == len(hold_out(keys, mask, 0.1, ["dev", "test"])) == 0
    assert len(cap_sources(keys, mask, 1)) == len(sample(keys, mask, 1, 0)) == 0


def test_twenty_thousand_rows_cost_little_memory() -> None:
    """Keys, repeats and splits stay under 300 bytes a row, the arrays included."""
    import tracemalloc

    builder = KeysBuilder()
    tracemalloc.start()
    for number in range(20_000):
        digest = hashlib.blake2b(str(number % 18_000).encode(), digest_size=16).digest()
        builder.append(digest, digest, "train" if number % 9 else "test", number % 5)
    keys = builder.build()
    kept = find_repeats(keys) == KEPT
    roles = hold_out(keys, kept, 0.1, ["dev"])
    leaks(keys, roles, kept)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept.sum() == 18_000
    assert peak < 300 * 20_000
