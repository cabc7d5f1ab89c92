"""The card shows every model's scores, how sure the gain is, and what was forgotten."""

from __future__ import annotations

from pathlib import Path

from finished_run import make_outcome, make_plan, make_snapshot

from qwen3ft.card import build_card, to_markdown
from qwen3ft.config import TrainingConfig
from qwen3ft.form_checks import FORM_CHECKS
from qwen3ft.promote import decide
from qwen3ft.records import SavedAdapter
from qwen3ft.result_records import (
    Champion,
    Comparison,
    InferenceReport,
    ModelLabel,
    ModelScore,
    RivalLabel,
    SplitScore,
)
from qwen3ft.scoring import METRICS

CHAMPION = Champion(registered_model="qwen3ft-embedded", version="7", source_uri="models:/x/7")


def score(label: ModelLabel, share: float, loss: float, ability: float | None) -> ModelScore:
    return ModelScore(
        label=label,
        rows=40,
        exact_match=share,
        token_f1=share,
        chrf=share,
        answer_loss=loss,
        ability_loss=ability,
        form=dict.fromkeys(FORM_CHECKS, 1.0),
        by_split={"fact": SplitScore(rows=40, exact_match=share)},
    )


def gains(rival: RivalLabel, value: float) -> list[Comparison]:
    return [
        Comparison(
            rival=rival, metric=metric, rows=40, gain=value, low=value - 0.02, high=value + 0.02
        )
        for metric in METRICS
    ]


def markdown(ability: float | None) -> str:
    report = InferenceReport(
        adapter_path="adapter",
        questions_sha256="0" * 64,
        scores=(
            score("base", 0.1, 2.0, 1.5),
            score("champion", 0.5, 1.0, 1.6),
            score("candidate", 0.9, 0.5, ability),
        ),
        comparisons=(*gains("base", 0.8), *gains("champion", 0.4)),
        samples=(),
        answers_path="answers.jsonl",
        checks={},
    )
    saved = SavedAdapter(path="adapter", sha256="1" * 64, size_bytes=1, model_name="embedded")
    verdict = decide(report, saved, champion=CHAMPION)
    plan, outcome = make_plan(make_snapshot()), make_outcome(Path("step-000010"))
    config = TrainingConfig(model_name="embedded")
    return to_markdown(build_card(config, plan, outcome, saved, report, verdict, (), {}))


def test_the_scores_of_all_three_stand_side_by_side_with_the_gain() -> None:
    """The gain is over the champion, with its interval; form and forgetting are there too."""
    lines = markdown(1.6).splitlines()
    forgotten = "1.500 -> 1.600 (+0.100 nats per token, limit +0.25)"
    assert lines[0] == "# embedded: promoted"
    assert lines[2].startswith("**promoted: better than champion v7: exact match 90.0%")
    for line in (
        "| score | base | champion | candidate | gain over the champion (interval) |",
        "| exact match | 10.0% | 50.0% | 90.0% | +40.0 (+38.0 to +42.0) points |",
        "| answer loss | 2 | 1 | 0.5 | +0.400 (+0.380 to +0.420) nats |",
        "| loss on the ability set | 1.5 | 1.6 | 1.6 | |",
        "| language of the question | 100.0% | 100.0% | 100.0% | |",
        f"| forgetting | loss on the ability set {forgotten} |",
        "| fact | 40 | 10.0% | 90.0% |",
    ):
        assert line in lines


def test_what_was_forgotten_is_the_verdict() -> None:
    """Better in everything that was asked for, and kept."""
    lines = markdown(4.0).splitlines()
    assert lines[0] == "# embedded: kept"
    assert lines[2].startswith("**kept: it forgets: loss on the ability set 4 against 1.5")


def test_a_loss_that_is_not_known_is_said() -> None:
    """Nothing is shown as a number that is none."""
    text = markdown(None)
    assert "| forgetting | not measured |" in text
    assert "| loss on the ability set | 1.5 | 1.6 | not finite | |" in text
