"""A request to compare base, candidate and champion, for tests of the inference test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.data_stage import write_jsonl
from support.trained_adapter import Trained

from qwen3ft.embedded import corpus
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.requests import InferenceRequest

THINKING = (1, 3)
"""Rows with reasoning."""


def three_models(trained: Trained, tmp_path: Path, rows_asked: int = 6) -> InferenceRequest:
    """Ask base, candidate and champion, before two of whose answers they may think."""
    rows: list[dict[str, Any]] = [dict(row) for row in trained.rows[:rows_asked]]
    for index in THINKING:
        rows[index]["reasoning"] = "It is known. " * 12
    write_jsonl(tmp_path / "test.jsonl", rows)
    write_jsonl(tmp_path / "ability.jsonl", corpus.draw_ability_rows()[:3])
    changes = {
        "cache_dir": str(tmp_path / "cache"),
        "ability_path": str(tmp_path / "ability.jsonl"),
        "max_new_tokens": 8,
        "max_thinking_tokens": 3,
    }
    return InferenceRequest(
        config=trained.config.model_copy(update=changes),
        model=trained.snapshot,
        adapter=trained.saved,
        champion=Champion(
            registered_model="qwen3ft-embedded",
            version="7",
            source_uri="x",
            adapter_path=trained.early.path,
        ),
        questions_path=str(tmp_path / "test.jsonl"),
        answers_path=str(tmp_path / "answers.jsonl"),
        device="cpu",
        batch_size=4,
    )


def with_settings(request: InferenceRequest, folder: Path, **settings: Any) -> InferenceRequest:
    """Return the request with other settings, and a cache and answers of its own."""
    config = request.config.model_copy(update={"cache_dir": str(folder / "cache"), **settings})
    changes = {"config": config, "answers_path": str(folder / "answers.jsonl")}
    return request.model_copy(update=changes)
