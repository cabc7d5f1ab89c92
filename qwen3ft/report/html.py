"""The run card as one HTML file: readable on a phone, in dark mode and without a network.

The page refers to nothing outside itself and tells the browser so. Jinja escapes every value.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from qwen3ft.evaluation.wording import format_seconds, judge_text
from qwen3ft.records.run_card import RunCard
from qwen3ft.report.attempts import attempt_rows
from qwen3ft.report.charts import SIZE, loss_chart, memory_chart
from qwen3ft.report.data_section import MOST_FILES, new_rows_sentence
from qwen3ft.report.facts import card_facts, score_table, split_table

if TYPE_CHECKING:
    from jinja2 import Template

CARD_TEMPLATE = "card.html.jinja"


def card_html(card: RunCard) -> str:
    """Render the card as a page."""
    urls = {"Prefect": card.prefect_url, "MLflow": card.mlflow_url}
    charts = (loss_chart(card.loss), memory_chart(card.memory))
    return _template().render(
        card=card,
        links=[(name, url) for name, url in urls.items() if url and url.startswith("http")],
        facts=[fact for fact in card_facts(card) if fact.headline],
        new_rows=new_rows_sentence(card.data) if card.data else "",
        most_files=MOST_FILES,
        attempts=attempt_rows(card.attempts),
        charts=[chart for chart in charts if chart is not None],
        size=SIZE,
        scores=score_table(card),
        splits=split_table(card),
        judged=judge_text(card.judge) if card.judge else "",
        total_seconds=sum(card.seconds_by_stage.values()),
    )


@lru_cache(maxsize=1)  # compiling takes longer than rendering
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("qwen3ft.report", ""),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelled field fails a test instead of showing nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "thousands": lambda count: f"{count:,}",
        "per_cent": lambda share: f"{share:.1%}",
        "duration": format_seconds,
    }
    return environment.get_template(CARD_TEMPLATE)
