"""The card of a run as markdown: for Prefect's artifact page, card.md, and MLflow's description.

Guarantees: pure; whatever texts of users hold, they are one cell or one line of it and nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwen3ft.evaluation.wording import (
    METRIC_NAMES,
    OTHER_SCORES,
    interval_text,
    judge_text,
    score_text,
)
from qwen3ft.records.evaluation import MODELS
from qwen3ft.records.run_card import RunCard
from qwen3ft.report.attempts import changes_text, reasons_text
from qwen3ft.report.curves import sparkline
from qwen3ft.report.data_section import files_markdown, new_rows_markdown
from qwen3ft.report.safe_text import escape_markdown

MOST_CELL_CHARACTERS = 400


def card_markdown(card: RunCard) -> str:
    """The whole card."""
    return "\n".join(_sections(card))


def card_description(card: RunCard, most_characters: int) -> str:
    """As many of its first sections as fit: MLflow refuses longer descriptions."""
    told = ""
    for section in _sections(card):
        if len(told) + len(section) + 1 > most_characters:
            break
        told += f"{section}\n"
    return told or card.verdict[:most_characters]


def _sections(card: RunCard) -> Iterator[str]:
    """Each ends with a line break; the most important ones come first."""
    for lines in (
        _head(card),
        _failure(card),
        _scores(card),
        _splits(card),
        _what_next(card),
        _attempts(card),
        _curves(card),
        _data(card),
        _plan(card),
        _stages(card),
        [f"> {escape_markdown(note)}\n" for note in card.notes],
        _answers(card),
    ):
        if lines:
            yield "\n".join(lines) + "\n"


def _head(card: RunCard) -> list[str]:
    lines = [f"# {escape_markdown(card.title)}", "", f"**{escape_markdown(card.verdict)}**", ""]
    if len(card.reasons) > 1:
        lines += [*(f"- {escape_markdown(reason)}" for reason in card.reasons), ""]
    facts = {
        "trained on": card.trained_on,
        "exact match": _before_after(card.base_score, card.tuned_score, "exact_match"),
        "forgetting": escape_markdown(card.forgetting),
        **_judge(card),
        "held-out loss": _before_after(
            card.held_out_loss_before, card.held_out_loss_after, "answer_loss"
        ),
        "peak memory": _peak(card),
        "speed": f"{card.tokens_per_second:,.0f} tokens/s" if card.tokens_per_second else "",
        "kernels": escape_markdown(card.kernels),
        "adapter": escape_markdown(card.adapter_path or ""),
        "run": escape_markdown(card.run_id),
        "MLflow": f"[this run]({card.mlflow_url})" if card.mlflow_url else "",
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    return [*lines, "| | |", "|---|---|", *rows]


def _judge(card: RunCard) -> dict[str, str]:
    told = judge_text(card.judge) if card.judge else ""
    return {f"judge {escape_markdown(card.judge.model)}": told} if card.judge and told else {}


def _before_after(before: float | None, after: float | None, metric: str) -> str:
    if before is None or after is None:
        return ""
    if metric == "exact_match":
        return f"{before:.1%} → **{after:.1%}**"
    return f"{before:.3f} → {after:.3f}"


def _peak(card: RunCard) -> str:
    if card.peak_memory_gb is None:
        return ""
    of = f" of {card.budget_gb:g}" if card.budget_gb is not None else ""
    return f"{card.peak_memory_gb:.2f}{of} GB"


def _failure(card: RunCard) -> list[str]:
    if card.failure is None:
        return []
    lines = ["## What went wrong", "", f"{escape_markdown(card.failure.kind)}:", ""]
    lines += [f"    {line}" for line in card.failure.what.splitlines()]
    return [*lines, "", f"Why: {escape_markdown(card.failure.why)}"] if card.failure.why else lines


def _scores(card: RunCard) -> list[str]:
    """Every model's scores, the candidate's gain over the one to beat, and the forms."""
    models = {score.label: score for score in card.scores}
    if "candidate" not in models:
        return []
    labels = [label for label in MODELS if label in models]
    gains = {c.metric: interval_text(c) for c in card.comparisons if c.rival == card.rival}
    lines = [
        "## Scores",
        "",
        f"| score | {' | '.join(labels)} | gain over the {card.rival} (interval) |",
    ]
    lines.append("|---" * (len(labels) + 2) + "|")
    for metric, name in METRIC_NAMES.items():
        cells = [score_text(metric, getattr(models[label], metric)) for label in labels]
        lines.append(f"| {name} | {' | '.join(cells)} | {gains.get(metric, '')} |")
        if metric == "exact_match":
            sure = [share_range(models[label].exact_match_interval) for label in labels]
            lines.append(f"| its {card.confidence:.0%} interval | {' | '.join(sure)} | |")
    for field, name in OTHER_SCORES.items():
        cells = [score_text(field, getattr(models[label], field)) for label in labels]
        lines.append(f"| {name} | {' | '.join(cells)} | |")
    for check in models["candidate"].form:
        shares = [f"{models[label].form.get(check, 0.0):.1%}" for label in labels]
        lines.append(f"| {check} | {' | '.join(shares)} | |")
    for check in models["candidate"].sampled_form:
        shares = [f"{models[label].sampled_form.get(check, 0.0):.1%}" for label in labels]
        lines.append(f"| {check}, sampled | {' | '.join(shares)} | |")
    return lines


def share_range(interval: tuple[float, float] | None) -> str:
    """Format an interval of shares as `82.4% to 88.7%`; '' for None."""
    if interval is None:
        return ""
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def _splits(card: RunCard) -> list[str]:
    if not card.scores_by_split:
        return []
    lines = ["| questions | rows | base | tuned |", "|---|---|---|---|"]
    return lines + [
        f"| {escape_markdown(split)} | {rows} | {base:.1%} | {tuned:.1%} |"
        for split, (base, tuned, rows) in sorted(card.scores_by_split.items())
    ]


def _what_next(card: RunCard) -> list[str]:
    lines = ["## Back, and on", "", f"To roll back: {escape_markdown(card.roll_back.what)}", ""]
    if card.roll_back.command:
        lines += [f"    {card.roll_back.command}", ""]
    for step in card.next_steps:
        lines += [f"{escape_markdown(step.what)}:", "", f"    {step.command}", ""]
    return lines


def _attempts(card: RunCard) -> list[str]:
    if not card.attempts:
        return []
    lines = [
        "## Attempts",
        "",
        "| attempt | what changed | why | outcome | batch | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for before, attempt in zip((None, *card.attempts), card.attempts, strict=False):
        batch = f"{attempt.micro_batch_size} x {attempt.gradient_accumulation_steps}"
        cells = (
            changes_text(attempt, before),
            reasons_text(attempt),
            f"{attempt.outcome}: {attempt.detail}",
        )
        told = " | ".join(_cell(cell) for cell in cells)
        lines.append(f"| {attempt.attempt} | {told} | {batch} | {attempt.seconds:.1f} |")
    return lines


def _curves(card: RunCard) -> list[str]:
    """Each curve as a line of text: this page has no pictures."""
    lines = []
    for curve in card.loss:
        for name, points in (("training", curve.training), ("held-out", curve.held_out)):
            lines += _spark(f"{name} loss, attempt {curve.attempt}", points, ".3f")
    for memory in card.memory:
        lines += _spark(f"memory in GB, attempt {memory.attempt}", memory.process, ".2f")
    return ["## Curves", "", "| | first | | last |", "|---|---|---|---|", *lines] if lines else []


def _spark(name: str, points: Sequence[tuple[float, float]], digits: str) -> list[str]:
    if len(points) < 2:
        return []
    values = [value for _, value in points]
    return [f"| {name} | {values[0]:{digits}} | {sparkline(values)} | {values[-1]:{digits}} |"]


def _data(card: RunCard) -> list[str]:
    if card.data is None:
        return []
    sums = " + ".join(f"{count:,} {name}" for name, count in card.data.went.items() if count)
    return [
        "## Data",
        "",
        f"{card.data.rows_read:,} rows read = {sums}.",
        "",
        *new_rows_markdown(card.data),
        *(f"> {escape_markdown(warning)}\n" for warning in card.data.warnings),
        *files_markdown(card.data.files, card.data.since),
    ]


def _plan(card: RunCard) -> list[str]:
    if card.plan is None:
        return []
    lines = ["## Plan", "", escape_markdown(card.plan.headline), ""]
    lines += ["| setting | value | why |", "|---|---|---|"]
    return lines + [
        f"| {line.name} | {_cell(line.value)} | {_cell(line.why)} |" for line in card.plan.settings
    ]


def _stages(card: RunCard) -> list[str]:
    if not card.seconds_by_stage:
        return []
    lines = ["## Time", "", "| stage | seconds |", "|---|---|"]
    lines += [f"| {stage} | {seconds:.1f} |" for stage, seconds in card.seconds_by_stage.items()]
    return [*lines, f"| in all | {sum(card.seconds_by_stage.values()):.1f} |"]


def _answers(card: RunCard) -> list[str]:
    if not card.answers:
        return []
    lines = ["## Where the models differ most", ""]
    for number, one in enumerate(card.answers, 1):
        lines += [
            f"{number}. **{escape_markdown(one.question)}** ({escape_markdown(one.split)})",
            "",
        ]
        lines += [f"    - right: {escape_markdown(one.reference)}"]
        lines += [
            f"    - {answer.model} {'✓' if answer.right else '✗'}: {escape_markdown(answer.text)}"
            for answer in one.answers
        ]
        lines.append("")
    return lines


def _cell(text: str) -> str:
    cut = text if len(text) <= MOST_CELL_CHARACTERS else f"{text[:MOST_CELL_CHARACTERS]} …"
    return escape_markdown(cut)
