"""The card's numbers as text, written once for markdown, HTML and the terminal."""

from __future__ import annotations

from typing import NamedTuple

from qwen3ft.evaluation.wording import (
    METRIC_NAMES,
    OTHER_SCORES,
    format_seconds,
    interval_text,
    judge_text,
    score_text,
)
from qwen3ft.records.evaluation import MODELS, RIVALS, Comparison, ModelLabel, RivalLabel
from qwen3ft.records.run_card import NO_CHAMPION, RunCard
from qwen3ft.report.attempts import kind_text

MOST_LINES = 10
"""Most damaged lines of the journal that are named."""


class CardFact(NamedTuple):
    """One line of the card's head."""

    label: str
    value: str
    note: str = ""
    """Unit or context, worded to follow the value."""
    headline: bool = False
    """True for the numbers that readers look for first."""

    @property
    def text(self) -> str:
        """Value and note in one line."""
        return f"{self.value} {self.note}".rstrip()


class ScoreLine(NamedTuple):
    """One line of the table of scores."""

    name: str
    cells: list[str]
    """One for each model."""
    gains: list[str]
    """One for each rival; empty where no gain is computed."""


class ScoreTable(NamedTuple):
    """Scores and form checks of every model that was evaluated."""

    labels: list[ModelLabel]
    rivals: list[RivalLabel]
    scores: list[ScoreLine]
    forms: list[ScoreLine]


def card_facts(card: RunCard) -> list[CardFact]:
    """Return the facts of the card's head; those of stages that were not reached are left out."""
    loss = _change(card.held_out_loss_before, card.held_out_loss_after, ".3f")
    attempts = len(card.attempts)
    facts = [
        _in_use(card),
        CardFact("trained on", card.trained_on),
        CardFact("compared with", card.compared_with),
        CardFact(
            "exact match",
            _change(card.base_score, card.tuned_score, ".1%"),
            _from_base(card),
            headline=True,
        ),
        *(_gain(card, one) for one in card.comparisons if one.metric == card.main_metric),
        CardFact("forgetting", card.forgetting),
        *([CardFact(f"judge {card.judge.model}", judge_text(card.judge))] if card.judge else []),
        CardFact("held-out loss", loss, "nats per token", headline=True),
        CardFact(
            "peak memory",
            _number(card.peak_memory_gb, ".2f", "GB"),
            "" if card.budget_gb is None else f"of {card.budget_gb:g} GB",
            headline=True,
        ),
        CardFact(
            "speed",
            _number(card.tokens_per_second, ",.0f", "tokens/s"),
            f"with {card.kernels.partition(':')[0]} kernels" if card.kernels else "",
            headline=True,
        ),
        CardFact("kernels", card.kernels),
        CardFact("answers by", card.answered_by),
        CardFact("questions", card.questions),
        CardFact("thinking", card.thinking),
        CardFact(
            "time",
            format_seconds(sum(card.seconds_by_stage.values())) if card.seconds_by_stage else "",
            f"in {attempts} attempt{'' if attempts == 1 else 's'}" if attempts else "",
            headline=True,
        ),
        CardFact(
            "attempts",
            ", ".join(f"{one.attempt}: {kind_text(one.outcome)}" for one in card.attempts),
        ),
        CardFact("journal", _damaged(card.damaged_lines), "so MLflow lacks what they held"),
        CardFact("adapter", card.adapter_path or ""),
        CardFact("run", card.run_id),
    ]
    return [fact for fact in facts if fact.value]


def _in_use(card: RunCard) -> CardFact:
    before = card.champion_version
    named = "" if before in (None, NO_CHAMPION, card.version) else f"version {before}"
    if card.outcome == "promoted":
        replaced = f"in place of {named}" if named else ""
        return CardFact("put into use", f"version {card.version}", replaced, headline=True)
    return CardFact("in use before", named, "not replaced by this run", headline=True)


def _from_base(card: RunCard) -> str:
    champion = next((score for score in card.scores if score.label == "champion"), None)
    rest = "" if champion is None else f"; champion {champion.exact_match:.1%}"
    return f"from base to candidate{rest}"


def _damaged(lines: tuple[int, ...]) -> str:
    if not lines:
        return ""
    named = ", ".join(map(str, lines[:MOST_LINES])) + (", ..." if lines[MOST_LINES:] else "")
    return f"{len(lines)} damaged line{'s' if lines[1:] else ''} of tracking.jsonl skipped: {named}"


def _gain(card: RunCard, comparison: Comparison) -> CardFact:
    gain, _, rest = interval_text(comparison).partition(" ")
    note = f"{rest} of {METRIC_NAMES[comparison.metric]}"
    return CardFact(f"gain over {comparison.rival}", gain, note, comparison.rival == card.rival)


def _change(before: float | None, after: float | None, digits: str) -> str:
    return "" if before is None or after is None else f"{before:{digits}} → {after:{digits}}"


def _number(value: float | None, digits: str, unit: str) -> str:
    return f"{value:{digits}} {unit}" if value else ""


def split_table(card: RunCard) -> list[tuple[str, ...]]:
    """Return exact match by group of questions, a header and one row each; [] without groups."""
    scores = {score.label: score.by_split for score in card.scores}
    champion = scores.get("champion")
    rows = []
    for split, (base, tuned, count) in sorted(card.scores_by_split.items()):
        cells = [f"{base:.1%}", f"{tuned:.1%}"]
        if champion is not None:
            share = f"{champion[split].exact_match:.1%}" if split in champion else ""
            cells.insert(1, share)
        rows.append((split, f"{count:,}", *cells))
    labels = ("base", "candidate") if champion is None else MODELS
    return [("questions", "rows", *labels), *rows] if rows else []


def score_table(card: RunCard) -> ScoreTable | None:
    """Return every model's scores with the candidate's gains; None if nothing was evaluated."""
    models = {score.label: score for score in card.scores}
    if "candidate" not in models:
        return None
    labels = [label for label in MODELS if label in models]
    rivals = [rival for rival in RIVALS if rival in models]
    gains = {(one.rival, one.metric): interval_text(one) for one in card.comparisons}
    none = [""] * len(rivals)
    lines = []
    for metric, name in METRIC_NAMES.items():
        cells = [score_text(metric, getattr(models[label], metric)) for label in labels]
        lines.append(ScoreLine(name, cells, [gains.get((one, metric), "") for one in rivals]))
        if metric == "exact_match":
            ranges = [_range(models[label].exact_match_interval) for label in labels]
            lines.append(ScoreLine(f"its {card.confidence:.0%} interval", ranges, none))
    for field, name in OTHER_SCORES.items():
        cells = [score_text(field, getattr(models[label], field)) for label in labels]
        lines.append(ScoreLine(name, cells, none))
    forms = [
        ScoreLine(
            f"{check}{mark}",
            [f"{getattr(models[label], field).get(check, 0.0):.1%}" for label in labels],
            none,
        )
        for field, mark in (("form", ""), ("sampled_form", ", sampled"))
        for check in getattr(models["candidate"], field)
    ]
    return ScoreTable(labels, rivals, lines, forms)


def _range(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.1%} to {interval[1]:.1%}" if interval else ""
