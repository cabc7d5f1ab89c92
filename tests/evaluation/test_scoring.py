"""Answers become scores, signs of broken form, and gains with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3ft.evaluation import scoring
from qwen3ft.evaluation.answer_loss import RowLoss
from qwen3ft.evaluation.answers import Generated, Question
from qwen3ft.evaluation.form_checks import check_form, language_fits, thinking_is_well_formed
from qwen3ft.evaluation.text_metrics import answer_tokens, chrf, token_f1
from qwen3ft.records.evaluation import RowScore


def generated(text: str, *, stopped: bool = True) -> Generated:
    return Generated(text=text, stopped=stopped, tokens=len(text))


# --- metrics ---


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("47 crowns", "47 crowns.", 1.0),
        ("it costs 47 crowns", "47 crowns", 2 * 2 / (4 + 2)),
        ("crowns crowns", "47 crowns", 2 * 1 / (2 + 2)),  # a word counts once for each in both
        ("亚麻布", "亚麻", 2 * 2 / (3 + 2)),
        ("价格是 47 crowns", "47 crowns", 2 * 2 / (5 + 2)),
        ("<think>47 crowns</think>no", "47 crowns", 0.0),
        ("", "47 crowns", 0.0),
        ("?", "?", 0.0),  # there is no word in it
    ],
)
def test_token_f1_counts_words_and_chinese_characters(
    answer: str, reference: str, expected: float
) -> None:
    """The values were computed by hand."""
    assert token_f1(answer, reference) == pytest.approx(expected)


def test_chrf_is_that_of_sacrebleu_on_what_is_compared() -> None:
    """Case, width, thinking and final punctuation do not count; characters do."""
    assert chrf("<think>x</think>ＬＩＮＥＮ.", "linen") == pytest.approx(1.0)
    assert chrf("亚麻。", "亚麻") == pytest.approx(1.0)
    assert 0 < chrf("亚麻布", "亚麻") < 1
    assert chrf("xyz", "clay") > chrf("xvz", "clod") == 0.0
    assert chrf("", "clay") == 0.0
    # One of two characters, none of the pairs: F2 of 1/2 and 0, over two orders.
    assert chrf("ab", "ac") == pytest.approx(0.25)


@given(st.text(max_size=30), st.text(max_size=30))
def test_scores_are_shares_and_full_where_the_answer_is_right(answer: str, reference: str) -> None:
    """They are between 0 and 1 for any two texts, and 1 for equal ones."""
    for score in (token_f1, chrf):
        assert 0 <= score(answer, reference) <= 1 + 1e-9
        if answer_tokens(reference):
            assert score(reference, reference) == pytest.approx(1.0)


# --- form ---


QUESTION = Question("What is it made of?", "It is made of linen.")


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        (generated("It is made of clay."), set()),
        (generated("It is made of clay.", stopped=False), {"stops by itself"}),
        (generated(""), {"not empty", "language of the question"}),
        (generated("clay " * 20), {"no loops"}),
        (generated("它是用陶土做的。"), {"language of the question"}),
        (generated(" ".join(f"clay{n}" for n in range(50))), {"length within bounds"}),
        (generated("<think>hm</think>It is clay."), {"well-formed thinking"}),
    ],
)
def test_each_sign_of_broken_form_is_reported_alone(answer: Generated, broken: set[str]) -> None:
    """Each check fails alone, and a well-formed answer passes all of them."""
    checks = check_form(answer, QUESTION, thinking=False)
    assert {name for name, passed in checks.items() if not passed} == broken


@pytest.mark.parametrize(
    ("text", "asked", "expected"),
    [
        ("<think>\nhm\n</think>\n\nclay", True, True),
        ("clay", False, True),
        ("clay", True, False),
        ("<think>\nhm", True, False),
        ("<think></think>clay", True, False),  # nothing was thought
        ("clay <think>hm</think>", True, False),
        ("<think>a</think><think>b</think>clay", True, False),
        ("clay</think>", False, False),
    ],
)
def test_thinking_is_one_closed_block_in_front_where_it_was_asked_for(
    text: str, asked: bool, expected: bool
) -> None:
    """If it was not asked for, there must be none."""
    assert thinking_is_well_formed(text, asked=asked) is expected


def test_thinking_that_its_budget_ended_is_reported() -> None:
    """The end was written for the model, so the text alone looks well."""
    thought = Generated("<think>\nhm\n</think>\n\nIt is made of clay.", stopped=True, tokens=9)
    for cut in (False, True):
        checks = check_form(replace(thought, thinking_cut=cut), QUESTION, thinking=True)
        broken = [name for name, passed in checks.items() if not passed]
        assert broken == ["ends its thinking"] * cut


@pytest.mark.parametrize(
    ("answer", "question", "reference", "fits"),
    [
        ("亚麻", "它是什么材料？", "亚麻", True),
        ("linen", "它是什么材料？", "亚麻", False),
        ("I like reading.", "翻译成英文：我喜欢读书。", "I like reading.", True),
        ("2005-07-02", "请用 ISO 格式表示 2 July 2005。", "2005-07-02", True),
        ("Ondalis 是亚麻做的", "Ondalis 是什么做的？", "亚麻", True),
        ("Это лён", "What is it?", "linen", False),
        ("", "What is it?", "linen", False),
    ],
)
def test_the_language_is_that_of_the_question_or_the_reference(
    answer: str, question: str, reference: str, fits: bool
) -> None:
    """Latin names inside Chinese count as Chinese, and numbers fit any language."""
    assert language_fits(answer, Question(question, reference)) is fits


# --- scores ---


def rows_of(
    answers: Sequence[Generated], questions: Sequence[Question], losses: Sequence[RowLoss]
) -> list[RowScore]:
    return [
        scoring.score_row(question, answer, loss, thinking=False)
        for question, answer, loss in zip(questions, answers, losses, strict=True)
    ]


def test_scores_count_by_split() -> None:
    """Shares are over all questions and over each split; losses weigh tokens."""
    questions = [Question("q1", "a", "x"), Question("q2", "b", "x"), Question("q3", "c", "y")]
    answers = [generated("A."), generated("no", stopped=False), generated("<think>\nc")]
    losses = [RowLoss(3.0, 1), RowLoss(1.0, 3), RowLoss(0.0, 4)]
    ability = [RowLoss(2.0, 1), RowLoss(2.0, 3)]
    rows = rows_of(answers, questions, losses)
    score = scoring.score_model("candidate", [q.split for q in questions], rows, ability)
    assert score.exact_match == pytest.approx(1 / 3)
    by_split = {split: (s.rows, s.exact_match) for split, s in score.by_split.items()}
    assert by_split == {"x": (2, 0.5), "y": (1, 0.0)}
    assert score.form["stops by itself"] == pytest.approx(2 / 3)
    assert score.form["not empty"] == pytest.approx(2 / 3)
    assert (score.answer_loss, score.ability_loss) == (0.5, 1.0)
    assert score.perplexity == pytest.approx(math.exp(0.5))


def test_a_loss_that_is_not_finite_is_no_number() -> None:
    """It is None, so that it can never count as a gain."""
    questions = [Question("q1", "a"), Question("q2", "b")]
    broken = rows_of([generated("a")] * 2, questions, [RowLoss(math.nan, 1), RowLoss(1.0, 1)])
    sound = rows_of([generated("a")] * 2, questions, [RowLoss(1.0, 1)] * 2)
    score = scoring.score_model("candidate", ["x", "x"], broken)
    assert (score.answer_loss, score.ability_loss, score.perplexity) == (None, None, None)
    compared = scoring.compare_models("base", broken, sound, confidence=0.95)
    assert {c.metric for c in compared} == {"exact_match", "token_f1", "chrf"}


@pytest.mark.parametrize(
    ("odd", "differs", "failed"),
    [
        ([], True, []),
        ([], False, ["answers differ from base"]),
        ([generated("")] * 2, True, ["not empty"]),
        ([generated("no " * 30)] * 2, True, ["no loops"]),
        ([generated("right", stopped=False)] * 2, True, []),  # a tenth is allowed
        ([generated("right", stopped=False)] * 3, True, ["stops by itself"]),
    ],
)
def test_each_check_fails_alone(odd: list[Generated], differs: bool, failed: list[str]) -> None:
    """A check names the one thing that is wrong with some of 20 answers."""
    questions = [Question(f"q{n}", "right") for n in range(20)]
    answers = [*odd, *[generated("right")] * (20 - len(odd))]
    rows = rows_of(answers, questions, [RowLoss(1.0, 1)] * 20)
    checks = scoring.run_checks(scoring.score_model("candidate", ["x"] * 20, rows), differs=differs)
    assert [name for name, passed in checks.items() if not passed] == failed


def test_short_answers_are_right_or_wrong_and_long_ones_near() -> None:
    """The main metric follows from the references' length unless it is set."""
    short = [Question("q", "47 crowns"), Question("q", "亚麻"), Question("q", "word " * 50)]
    long = [Question("q", "a sentence of many words, which nobody writes twice the same")] * 3
    assert scoring.choose_main_metric("auto", short) == "exact_match"
    assert scoring.choose_main_metric("auto", long) == "token_f1"
    assert scoring.choose_main_metric("chrf", short) == "chrf"


# --- intervals ---


def test_the_interval_of_a_share_is_wilsons() -> None:
    """Values from the literature: 0 of 10, 5 of 10, 81 of 263 (Newcombe 1998)."""
    assert scoring.wilson_interval(0, 10, 0.95) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert scoring.wilson_interval(5, 10, 0.95) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert scoring.wilson_interval(81, 263, 0.95) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert scoring.wilson_interval(0, 0, 0.95) == (0.0, 1.0)


def test_a_gain_is_positive_for_the_better_model_in_every_metric() -> None:
    """A lower loss is a gain too; its size is that of the scores' difference."""
    questions = [Question(f"q{n}", "linen cloth") for n in range(40)]
    good = rows_of([generated("linen cloth")] * 40, questions, [RowLoss(1.0, 2)] * 40)
    poor = rows_of([generated("clay cloth")] * 40, questions, [RowLoss(3.0, 2)] * 40)
    gains = {c.metric: c for c in scoring.compare_models("base", good, poor, confidence=0.95)}
    assert gains["exact_match"].gain == 1.0
    assert gains["token_f1"].gain == pytest.approx(0.5)
    assert gains["answer_loss"].gain == pytest.approx(1.0)
    worse = {c.metric: c for c in scoring.compare_models("base", poor, good, confidence=0.95)}
    assert all(worse[metric].high < 0 for metric in gains)


def test_the_interval_is_that_of_the_normal_approximation_for_many_rows() -> None:
    """For 400 independent gains the bootstrap's bounds are mean +- 1.96 standard errors."""
    random = Random(0)
    gains = [random.choice((-1.0, 0.0, 0.0, 1.0, 1.0)) for _ in range(400)]
    interval = scoring.weighted_gain(gains, [1.0] * 400, confidence=0.95)
    mean = sum(gains) / 400
    error = math.sqrt(sum((g - mean) ** 2 for g in gains) / 399 / 400)
    assert interval.estimate == pytest.approx(mean)
    assert interval.low == pytest.approx(mean - 1.96 * error, abs=0.01)
    assert interval.high == pytest.approx(mean + 1.96 * error, abs=0.01)
    assert scoring.weighted_gain(gains, [1.0] * 400, confidence=0.95) == interval
    wider = scoring.weighted_gain(gains, [1.0] * 400, confidence=0.99)
    assert wider.low < interval.low
    assert wider.high > interval.high


def test_equal_models_hardly_ever_look_different() -> None:
    """Of 100 pairs of equal models about 2.5 % look different, the interval's own error."""
    significant = 0
    for seed in range(100):
        random = Random(seed)
        gains = [float(random.randint(-1, 1)) for _ in range(100)]
        significant += scoring.weighted_gain(gains, [1.0] * 100, confidence=0.95).low > 0
    assert significant <= 8  # 2.5 expected; more than 8 has a chance of 0.1 %


def test_weights_count() -> None:
    """A question of many tokens weighs as much as it has, in the bounds too."""
    interval = scoring.weighted_gain([1.0, 0.0] * 20, [3.0, 1.0] * 20, confidence=0.95)
    assert interval.estimate == pytest.approx(0.75)
    assert interval.low < 0.75 < interval.high


@pytest.mark.parametrize(
    ("gains", "weights", "expected"),
    [
        ([0.5], [1.0], 0.5),
        ([0.0] * 9, [1.0] * 9, 0.0),
        ([], [], math.nan),
        ([1.0, math.nan], [1.0, 1.0], math.nan),
        ([1.0, 2.0], [0.0, 0.0], math.nan),
    ],
)
def test_there_is_an_interval_for_what_has_no_spread(
    gains: list[float], weights: list[float], expected: float
) -> None:
    """One question or equal gains have one; a gain that is missing has none."""
    interval = scoring.weighted_gain(gains, weights, confidence=0.95)
    found = (interval.estimate, interval.low, interval.high)
    assert found == pytest.approx((expected,) * 3, nan_ok=True)
