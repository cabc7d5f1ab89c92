"""The card of a run as one HTML file: readable on a phone, in the dark, and without a network.

Guarantees: pure; the file refers to nothing outside itself, and says so to the browser; every value
is escaped by the template engine, so a text of users is never markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qwen3ft.evaluation.wording import (
    METRIC_NAMES,
    OTHER_SCORES,
    format_seconds,
    interval_text,
    judge_text,
    score_text,
)
from qwen3ft.records.evaluation import MODELS, RIVALS
from qwen3ft.records.run_card import RunCard
from qwen3ft.report.attempts import changes_text, kind_text, reasons_text
from qwen3ft.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Chart,
    loss_chart,
    memory_chart,
)
from qwen3ft.report.data_section import MOST_FILES, new_rows_sentence
from qwen3ft.report.markdown import share_range

if TYPE_CHECKING:
    from jinja2 import Template

CARD_TEMPLATE = "card.html.jinja"


def card_html(card: RunCard) -> str:
    """The card as a page."""
    labels = [label for label in MODELS if label in {score.label for score in card.scores}]
    candidate = next((score for score in card.scores if score.label == "candidate"), None)
    urls = {"Prefect": card.prefect_url, "MLflow": card.mlflow_url}
    return _template().render(
        card=card,
        links=[(name, url) for name, url in urls.items() if url and url.startswith("http")],
        facts=list(_facts(card)),
        new_rows=new_rows_sentence(card.data) if card.data else "",
        most_files=MOST_FILES,
        attempts=list(_attempts(card)),
        charts=_charts(card),
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM},
        labels=labels,
        rivals=[rival for rival in RIVALS if rival in labels],
        rows=candidate.rows if candidate else 0,
        judged=judge_text(card.judge) if card.judge else "",
        scores=list(_scores(card, labels)) if candidate else [],
        forms=list(_forms(card, labels)) if candidate else [],
        total_seconds=sum(card.seconds_by_stage.values()),
        notes=card.notes,
    )


@lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qwen3ft.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "thousands": lambda count: f"{count:,}",
        "per_cent": lambda share: f"{share:.1%}",
        "duration": format_seconds,
    }
    return environment.get_template(CARD_TEMPLATE)


def _facts(card: RunCard) -> Iterator[tuple[str, str, str]]:
    """(name, value, what else) of the numbers that one looks for first."""
    if card.base_score is not None and card.tuned_score is not None:
        yield "exact match", f"{card.base_score:.1%} → {card.tuned_score:.1%}", "base → candidate"
        if card.gain is not None:
            gain, _, rest = interval_text(card.gain).partition(" ")
            yield f"gain over the {card.rival}", gain, f"{METRIC_NAMES[card.main_metric]} {rest}"
    if card.held_out_loss_before is not None and card.held_out_loss_after is not None:
        change = f"{card.held_out_loss_before:.3f} → {card.held_out_loss_after:.3f}"
        yield "held-out loss", change, "nats per token"
    if card.peak_memory_gb is not None:
        of = f"of {card.budget_gb:g} GB" if card.budget_gb is not None else ""
        yield "peak memory", f"{card.peak_memory_gb:.2f} GB", of
    if card.tokens_per_second:
        path = card.kernels.partition(":")[0]
        yield "speed", f"{card.tokens_per_second:,.0f} tokens/s", f"kernels: {path}" if path else ""
    if card.seconds_by_stage:
        count = len(card.attempts)
        more = f"{count} attempt{'' if count == 1 else 's'}" if count else ""
        yield "time", format_seconds(sum(card.seconds_by_stage.values())), more


def _attempts(card: RunCard) -> Iterator[dict[str, Any]]:
    for before, attempt in zip((None, *card.attempts), card.attempts, strict=False):
        ended = kind_text(attempt.outcome)
        yield {
            "number": attempt.attempt,
            "changed": changes_text(attempt, before),
            "why": reasons_text(attempt),
            "end": f"{ended}: {attempt.detail.splitlines()[0] if attempt.detail else ''}",
            "batch": f"{attempt.micro_batch_size} x {attempt.gradient_accumulation_steps}",
            "seconds": attempt.seconds,
        }


def _charts(card: RunCard) -> list[Chart]:
    charts = (loss_chart(card.loss), memory_chart(card.memory))
    return [chart for chart in charts if chart is not None]


def _scores(card: RunCard, labels: list[Any]) -> Iterator[dict[str, Any]]:
    """One line a score: a cell for each model, and the gain over each rival with its interval."""
    models = {score.label: score for score in card.scores}
    rivals = [rival for rival in RIVALS if rival in labels]
    gains = {(c.rival, c.metric): interval_text(c) for c in card.comparisons}
    none = [""] * len(rivals)
    for metric, name in METRIC_NAMES.items():
        cells = [score_text(metric, getattr(models[label], metric)) for label in labels]
        told = [gains.get((rival, metric), "") for rival in rivals]
        yield {"name": name, "cells": cells, "gains": told}
        if metric == "exact_match":
            sure = [share_range(models[label].exact_match_interval) for label in labels]
            yield {"name": "its interval", "cells": sure, "gains": none}
    for field, name in OTHER_SCORES.items():
        cells = [score_text(field, getattr(models[label], field)) for label in labels]
        yield {"name": name, "cells": cells, "gains": none}


def _forms(card: RunCard, labels: list[Any]) -> Iterator[dict[str, Any]]:
    """One line a check of form: the share of each model's answers that pass."""
    models = {score.label: score for score in card.scores}
    for field, mark in (("form", ""), ("sampled_form", ", sampled")):
        for check in getattr(models["candidate"], field):
            shares = [f"{getattr(models[label], field).get(check, 0.0):.1%}" for label in labels]
            yield {"name": f"{check}{mark}", "cells": shares}
