"""The metrics and tags of a parent run: few keys, the same every night, so that a month compares.

`METRICS` and `TAGS` list all of them, besides what MLflow adds (`system/...`, `mlflow...`) and the
settings as parameters; docs/tracking.md explains each. All curves of an attempt are on its child
run; `CURVES`, of one attempt after the other, are on the parent too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qwen3ft.records.evaluation import MODELS, InferenceReport
from qwen3ft.records.preflight import PreflightReport
from qwen3ft.records.run_card import RunCard
from qwen3ft.units import gb

SCORES = ("exact_match", "token_f1", "answer_loss", "ability_loss")
STAGES = (
    *("environment", "model", "lora", "data", "plan", "preflight", "train", "save"),
    *("inference", "judge", "promote"),
)

CURVES = ("train/loss", "held_out/loss", "train/tokens_per_second", "memory/process_gb")

METRICS = (
    *(f"{score}/{model}" for score in SCORES for model in MODELS),
    *("gain", "gain_low", "gain_high"),
    *("judge/win_share", "judge/rows"),
    *("held_out_loss/first", "held_out_loss/best"),
    *("rows/trained", "rows/new", "rows/asked", "attempts"),
    *("memory/peak_gb", "memory/predicted_gb", "memory/preflight_gb", "memory/budget_gb"),
    *("tokens_per_second", "seconds/total"),
    *(f"seconds/{stage}" for stage in STAGES),
    *CURVES,
)
"""Every metric that a parent run can have."""

TAGS = (
    *("verdict", "verdict_sentence", "degraded", "failure"),
    *("run", "data_digest", "champion_before", "version"),
    *("prefect.flow_run_id", "prefect.flow_run_url", "changed_settings"),
)
"""Every tag that a parent run can have, except `qwen3ft.uid`, which identifies it."""

MOST_TAG_CHARACTERS = 2000

DECIMALS = 4
"""Places that every number but those of curves keeps; MLflow's tables show all there are."""


def report_metrics(report: InferenceReport) -> dict[str, float]:
    """Return the scores of every evaluated model, and the judge's count."""
    values = {
        f"{name}/{score.label}": getattr(score, name) for score in report.scores for name in SCORES
    }
    values["rows/asked"] = max((score.rows for score in report.scores), default=None)
    if report.judge is not None and report.judge.judged:
        values |= {"judge/win_share": report.judge.win_share, "judge/rows": report.judge.judged}
    return _finite(values)


def preflight_metrics(report: PreflightReport) -> dict[str, float]:
    """Return predicted memory and, if the preflight completed, measured memory."""
    measured = None if report.failure else gb(report.measured_bytes)
    predicted = gb(report.predicted_bytes)
    return _finite({"memory/predicted_gb": predicted, "memory/preflight_gb": measured})


def card_metrics(card: RunCard) -> dict[str, float]:
    """Return the numbers on the card, except for the scores."""
    gain = card.gain
    return _finite(
        {
            "gain": gain.gain if gain else None,
            "gain_low": gain.low if gain else None,
            "gain_high": gain.high if gain else None,
            "held_out_loss/first": card.held_out_loss_before,
            "held_out_loss/best": card.held_out_loss_after,
            "rows/trained": card.data.went["trained on"] if card.data else None,
            "rows/new": card.data.new_rows if card.data else None,
            "attempts": len(card.attempts) if card.attempts else None,
            "memory/peak_gb": card.peak_memory_gb,
            "memory/predicted_gb": card.plan.predicted_gb if card.plan else None,
            "memory/budget_gb": card.budget_gb,
            "tokens_per_second": card.tokens_per_second,
            "seconds/total": sum(card.seconds_by_stage.values()) or None,
            **{f"seconds/{stage}": seconds for stage, seconds in card.seconds_by_stage.items()},
        }
    )


def card_tags(card: RunCard) -> dict[str, str]:
    """Return tags to filter and group by: `tags.verdict = 'promoted'`."""
    tags = {
        "verdict": card.outcome,
        "verdict_sentence": card.verdict[:MOST_TAG_CHARACTERS],
        "degraded": "; ".join(card.degraded)[:MOST_TAG_CHARACTERS] or "no",
        "run": card.run_id,
    }
    tags |= {"champion_before": card.champion_version} if card.champion_version else {}
    tags |= {"data_digest": card.data.digest} if card.data else {}
    tags |= {"version": card.version} if card.version else {}
    tags |= {"failure": card.failure.kind} if card.failure else {}
    return tags


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {
        name: round(float(value), DECIMALS)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }
