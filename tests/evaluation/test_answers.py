"""Answers are compared, judged and scored as text, in any script."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3ft.chat.thinking import split_thinking
from qwen3ft.evaluation.answers import (
    Question,
    answers_are_sound,
    choose_questions,
    choose_samples,
    exact_match,
    is_looping,
    normalise,
)
from qwen3ft.records.evaluation import SideBySide

MATCHES = (
    ("  Forty-seven  crowns.\n", "forty-seven crowns"),
    ("亚麻。", "亚麻"),
    ("１２３", "123"),
    ("Straße", "STRASSE"),
    ("<think>\nlinen? no, clay\n</think>\n\nClay!", "clay"),
    ("it was in the prompt</think>clay", "clay"),
    ("e\u0301", "é"),
)
OTHERS = (
    *(("47 crown", "47 crowns"), ("4.7", "47"), ("50", "50%"), ("-5", "5"), ("", ""), ("?", "!")),
    *(("<think>\nclay", "clay"), ("the answer is clay", "clay")),
)


@pytest.mark.parametrize(
    ("answer", "reference", "matches"),
    [*((*pair, True) for pair in MATCHES), *((*pair, False) for pair in OTHERS)],
)
def test_answers_match_if_they_differ_in_form_alone(
    answer: str, reference: str, matches: bool
) -> None:
    """Case, width, space, final punctuation and thinking do not count; signs and units do."""
    assert exact_match(answer, reference) is matches


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    """The compared form is a fixed point, so the order of comparison cannot matter."""
    once = normalise(text)
    if "<think>" not in once and "</think>" not in once:
        assert normalise(once) == once


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\na\n</think>\n\nb", ("a", "b")),
        ("a\n</think>\n\nb", ("a", "b")),
        ("<think>\nstill going", ("still going", "")),
        ("<think>\n\n</think>\n\nb", ("", "b")),
        ("<think>a</think>b</think>c", ("a</think>b", "c")),
        ("use the <think> tag", ("", "use the <think> tag")),
        ("b", ("", "b")),
    ],
)
def test_thinking_is_split_from_the_answer(text: str, expected: tuple[str, str]) -> None:
    """The tags may be whole, opened by the prompt, never closed, or mere prose."""
    assert split_thinking(text) == expected


LOOPS = (
    "The colour is red red red red red red red red",
    "答案是红色红色红色红色红色红色",
    "!" * 40,
    "I see.\nI see.\nI see.\nI see.\nI s",
    "Well: " + "a rather long sentence that comes again and again. " * 5,
)
NO_LOOPS = (
    *("", "47 crowns", "ha ha ha", "1000000000000", "红红的苹果", "-" * 12),
    "I see. I see. And then the answer came to me after all.",
    "1. red\n2. blue\n3. red\n4. blue",
    # A long answer that nearly repeats, which has to be judged quickly too.
    ("ab" * 500 + "c") * 3 + "".join(chr(0x4E00 + i) for i in range(30_000)),
)


@pytest.mark.parametrize(
    ("text", "loops"), [*((text, True) for text in LOOPS), *((text, False) for text in NO_LOOPS)]
)
def test_a_loop_is_a_repeated_end(text: str, loops: bool) -> None:
    """Short runs, and repetition that the text recovers from, are normal language."""
    assert is_looping(text) is loops


@given(st.text(min_size=8, max_size=40).filter(str.split), st.integers(8, 20), st.text())
def test_any_text_repeated_to_the_end_is_a_loop(unit: str, repeats: int, before: str) -> None:
    """It does not matter what stands before the loop."""
    looped = " ".join((unit + " ").split() * repeats)
    if len(looped) >= 24:
        assert is_looping(before + " " + looped)


def test_soundness_needs_answers_that_end_and_go_on() -> None:
    """One empty answer in twenty passes; two, or no answers at all, do not."""
    good = [f"answer {number}" for number in range(20)]
    assert answers_are_sound([*good[:19], ""])
    assert not answers_are_sound([*good[:18], "", "<think>\nhm"])
    assert not answers_are_sound([*good[:18], "no " * 20, "no " * 20])
    assert not answers_are_sound([])


def test_questions_are_chosen_in_proportion_and_in_order() -> None:
    """A fifth of the questions takes a fifth of every split."""
    questions = [Question(f"q{i}", "a", "date" if i % 4 == 0 else "fact") for i in range(200)]
    chosen = choose_questions(questions, 40)
    assert chosen == sorted(set(chosen))
    assert sum(questions[index].split == "date" for index in chosen) == 10
    assert len(chosen) == 40


@given(st.lists(st.sampled_from("abc"), max_size=50), st.integers(1, 60))
def test_the_choice_has_the_size_asked_for(splits: list[str], limit: int) -> None:
    """The limit is met exactly, whatever the sizes of the splits."""
    questions = [Question(f"q{i}", "a", split) for i, split in enumerate(splits)]
    assert len(choose_questions(questions, limit)) == min(limit, len(questions))


def test_a_longer_file_keeps_most_of_the_choice() -> None:
    """Adding a tenth of new questions replaces few of those chosen before."""
    questions = [Question(f"q{i}", "a") for i in range(1100)]
    before = set(choose_questions(questions[:1000], 500))
    assert len(before & set(choose_questions(questions, 500))) > 430


def test_samples_show_the_largest_differences_of_every_split() -> None:
    """Splits take turns, and equal answers come last."""
    pairs = [
        SideBySide(question=f"{split}{i}", reference="r", base="same", candidate=text, split=split)
        for split in ("a", "b")
        for i, text in enumerate(["same", "some", "xyz"])
    ]
    samples = choose_samples(pairs, limit=4)
    assert [sample.question for sample in samples] == ["a2", "b2", "a1", "b1"]
    assert choose_samples(list(reversed(pairs)), limit=4) == samples
