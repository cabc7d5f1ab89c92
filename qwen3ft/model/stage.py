"""The model stage: quantise the base model once, in a worker, and keep the result."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.model.hub import fetch_model, fetch_tokenizer
from qwen3ft.model.manager import read_snapshot
from qwen3ft.model.tokenizer_trial import try_tokenizer
from qwen3ft.records.model import ModelSnapshot, ModelSource
from qwen3ft.records.requests import QuantizeRequest


def quantized_model(
    config: TrainingConfig, source: ModelSource, device: str, run: RunDir, target: Path
) -> ModelSnapshot:
    """Return the 4-bit model at `target`, made if it is missing or damaged."""
    if (snapshot := read_snapshot(target)) is not None:
        return snapshot
    try_tokenizer(config, fetch_tokenizer(source))
    request = QuantizeRequest(
        config=config,
        source=source,
        source_path=str(fetch_model(source)),
        target=str(target),
        device=cast(Literal["cuda", "cpu"], device),
    )
    job = run.job("quantize").create(request)
    return run_worker("quantize", job, ModelSnapshot, stall_seconds=config.stall_seconds)
