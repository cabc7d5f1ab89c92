"""Facts that every server is told of a fine-tuned model: its name, and the longest answer."""

from __future__ import annotations

import re
from typing import Any

from qwen3ft.model.saved_adapter import was_trained_to_think


def served_name(provenance: dict[str, Any]) -> str:
    """Return a short name for the model, which no other run's has."""
    model = provenance["base"]["model_name"].rstrip("/").rpartition("/")[2]
    slug = re.sub(r"[^a-z0-9.]+", "-", model.lower()).strip("-.")
    return f"{slug}-{provenance['run_id'][:8]}".lstrip("-")


def most_tokens(provenance: dict[str, Any]) -> int:
    """Return the longest answer of the test, with its thinking."""
    config = provenance["config"]
    thinking = config.get("max_thinking_tokens", 0) if was_trained_to_think(provenance) else 0
    return int(config["max_new_tokens"] + thinking)
