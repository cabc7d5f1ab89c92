"""Settings as they are typed: `--set key=value`, `--batch 4x16`."""

from __future__ import annotations

import re
from typing import Any

import typer
import yaml

from qwen3ft.config import TrainingConfig, with_current_names


def read_overrides(settings: list[str]) -> dict[str, Any]:
    """The values of `--set`, read as YAML."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE", param_hint="--set")
        value = yaml.safe_load(text)
        field = TrainingConfig.model_fields.get(name)
        if field is not None and isinstance(value, bool) and not isinstance(field.default, bool):
            value = text.strip()  # YAML reads packing=on as true
        if field is not None and isinstance(field.default, tuple) and isinstance(value, str):
            value = value.split(",")  # --set data_paths=a.jsonl,b.jsonl
        values[name] = value
    return with_current_names(values)


def read_batch(text: str) -> dict[str, int]:
    """`4x16`, or `64` for 64 x 1: batch_size and gradient_accumulation_steps."""
    found = re.fullmatch(r"(\d+)(?:\s*[x*×]\s*(\d+))?", text.strip().lower())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not like 4x16", param_hint="--batch")
    return {"batch_size": int(found[1]), "gradient_accumulation_steps": int(found[2] or 1)}
