"""Reports and adapters that the gate and the registry are tested with."""

from __future__ import annotations

from typing import Any

from qwen3ft.records.evaluation import (
    Comparison,
    InferenceReport,
    MetricName,
    ModelLabel,
    ModelScore,
    RivalLabel,
)
from qwen3ft.records.model import SavedAdapter

FORM = {
    "stops by itself": 1.0,
    "not empty": 1.0,
    "no loops": 1.0,
    "language of the question": 1.0,
}


def score(label: ModelLabel, exact_match: float, **changes: Any) -> ModelScore:
    values: dict[str, Any] = {
        "label": label,
        "rows": 50,
        "exact_match": exact_match,
        "token_f1": exact_match,
        "chrf": exact_match,
        "answer_loss": 1.0,
        "ability_loss": 2.0,
        "form": FORM,
        "sampled_form": {"stops by itself": 1.0},
    }
    return ModelScore(**{**values, **changes})


def gain(
    value: float, rival: RivalLabel = "base", *, half: float = 0.05, **changes: Any
) -> Comparison:
    """Return a gain with an interval of `half` on both sides."""
    values = {"rival": rival, "metric": "exact_match", "rows": 50, **changes}
    return Comparison(**values, gain=value, low=value - half, high=value + half)


def report(
    *scores: ModelScore,
    gains: tuple[Comparison, ...] = (gain(0.3),),
    checks: dict[str, bool] | None = None,
    main_metric: MetricName = "exact_match",
) -> InferenceReport:
    return InferenceReport(
        adapter_path="adapter",
        questions_sha256="0" * 64,
        scores=scores,
        comparisons=gains,
        main_metric=main_metric,
        samples=(),
        answers_path="answers.jsonl",
        checks=checks or {"not empty": True},
    )


def saved(**changes: Any) -> SavedAdapter:
    values: dict[str, Any] = {
        "path": "adapter",
        "sha256": "1" * 64,
        "size_bytes": 1,
        "model_name": "embedded",
        "registered_model": "qwen3ft-embedded",
        "version": "4",
    }
    return SavedAdapter(**{**values, **changes})


BASE, GOOD = score("base", 0.1), score("candidate", 0.4)
