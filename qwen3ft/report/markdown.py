"""The run card as markdown: for Prefect's artifact page, card.md and MLflow's description.

Users' texts are escaped, so each stays within its own cell or line.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen3ft.evaluation.wording import format_seconds
from qwen3ft.records.run_card import RunCard
from qwen3ft.report.attempts import attempt_rows
from qwen3ft.report.charts import loss_words, memory_words
from qwen3ft.report.data_section import files_markdown, new_rows_markdown
from qwen3ft.report.facts import card_facts, score_table, split_table
from qwen3ft.report.safe_text import escape_markdown, markdown_table

MOST_CELL_CHARACTERS = 400


def card_markdown(card: RunCard) -> str:
    """Render the whole card."""
    return "\n".join((f"# {escape_markdown(card.title)}\n", *_sections(card)))


def card_description(card: RunCard, most_characters: int, scores_url: str | None = None) -> str:
    """Render the first sections that fit into `most_characters`: MLflow refuses longer tags.

    Args:
        card: The card.
        most_characters: Longest text.
        scores_url: Address of a picture of the scores, which is shown after the verdict.
    """
    verdict, *others = _sections(card)
    picture = [f"![scores]({scores_url})\n"] if scores_url else []
    text = ""
    for section in (verdict, *picture, *others):
        if len(text) + len(section) + 1 > most_characters:
            break
        text += f"{section}\n"
    return text or card.verdict[:most_characters]


def _sections(card: RunCard) -> Iterator[str]:
    """Yield the sections, the most important first; each ends with a line break."""
    # The order decides what `card_description` keeps of a long card.
    for lines in (
        _verdict(card),
        _facts(card),
        _failure(card),
        _scores(card),
        _splits(card),
        _next_steps(card),
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


def _verdict(card: RunCard) -> list[str]:
    """Return the verdict, and the reasons that it does not name itself."""
    others = [f"- {escape_markdown(one)}" for one in card.reasons if one not in card.verdict]
    return [f"**{escape_markdown(card.verdict)}**", *(["", *others] if others else [])]


def _facts(card: RunCard) -> list[str]:
    rows = []
    for fact in card_facts(card):
        label, value, note = map(escape_markdown, fact[:3])
        bold = f"**{value}**" if fact.headline else value
        rows.append((label, f"{bold} {note}".rstrip()))
    if card.mlflow_url:
        rows.append(("MLflow", f"[this run]({card.mlflow_url})"))
    return markdown_table(("", ""), rows)


def _failure(card: RunCard) -> list[str]:
    if card.failure is None:
        return []
    lines = ["## What went wrong", "", f"{escape_markdown(card.failure.kind)}:", ""]
    lines += [f"    {line}" for line in card.failure.what.splitlines()]
    return [*lines, "", f"Why: {escape_markdown(card.failure.why)}"] if card.failure.why else lines


def _scores(card: RunCard) -> list[str]:
    table = score_table(card)
    if table is None:
        return []
    header = ["score", *table.labels, *(f"gain over {rival}" for rival in table.rivals)]
    rows = [(line.name, *line.cells, *line.gains) for line in (*table.scores, *table.forms)]
    return ["## Scores", "", *markdown_table(header, rows)]


def _splits(card: RunCard) -> list[str]:
    table = split_table(card)
    rows = [(escape_markdown(name), *cells) for name, *cells in table[1:]]
    return markdown_table(table[0], rows) if table else []


def _next_steps(card: RunCard) -> list[str]:
    lines = ["## Next steps", ""]
    if card.prepare_shell:
        lines += ["In a new shell, before the first of them:", "", f"    {card.prepare_shell}", ""]
    lines += [f"Roll back: {escape_markdown(card.roll_back.what)}", ""]
    if card.roll_back.command:
        lines += [f"    {card.roll_back.command}", ""]
    for step in card.next_steps:
        lines += [f"{escape_markdown(step.what)}:", "", f"    {step.command}", ""]
    return lines


def _attempts(card: RunCard) -> list[str]:
    rows = [
        (
            str(row["attempt"]),
            _cell(row["what changed"]),
            _cell(row["why"]),
            _cell(f"{row['outcome']}: {row['detail']}"),
            row["batch"],
            format_seconds(row["seconds"]),
        )
        for row in attempt_rows(card.attempts)
    ]
    header = ("attempt", "what changed", "why", "outcome", "batch", "time")
    return ["## Attempts", "", *markdown_table(header, rows)] if rows else []


def _curves(card: RunCard) -> list[str]:
    words = [words for words in (loss_words(card.loss), memory_words(card.memory)) if words]
    return ["## Curves", "", "\n\n".join(words)] if words else []


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
        *files_markdown(card.data),
    ]


def _plan(card: RunCard) -> list[str]:
    if card.plan is None:
        return []
    rows = [(line.name, _cell(line.value), _cell(line.why)) for line in card.plan.settings]
    headline = escape_markdown(card.plan.headline)
    return ["## Plan", "", headline, "", *markdown_table(("setting", "value", "why"), rows)]


def _stages(card: RunCard) -> list[str]:
    if not card.seconds_by_stage:
        return []
    stages = {**card.seconds_by_stage, "total": sum(card.seconds_by_stage.values())}
    rows = [(stage, format_seconds(seconds)) for stage, seconds in stages.items()]
    return ["## Time", "", *markdown_table(("stage", "time"), rows)]


def _answers(card: RunCard) -> list[str]:
    if not card.answers:
        return []
    lines = ["## Where the models differ most", ""]
    for number, one in enumerate(card.answers, 1):
        lines += [f"{number}. **{escape_markdown(one.question)}** ({escape_markdown(one.split)})"]
        lines += ["", f"    - reference: {escape_markdown(one.reference)}"]
        lines += [
            f"    - {answer.model} {'✓' if answer.right else '✗'}: {escape_markdown(answer.text)}"
            for answer in one.answers
        ]
        lines.append("")
    return lines


def _cell(text: str) -> str:
    cut = text if len(text) <= MOST_CELL_CHARACTERS else f"{text[:MOST_CELL_CHARACTERS]} …"
    return escape_markdown(cut)
