"""An adapter's own way of being asked: as its run trained and tested it."""

from __future__ import annotations

from typing import Any

from qwen3ft.config import TrainingConfig
from qwen3ft.model.saved_adapter import was_trained_to_think
from qwen3ft.records.serving import Prompting

_SETTINGS = ("max_new_tokens", "max_thinking_tokens", "special_tokens_in_text")


def trained_prompting(provenance: dict[str, Any]) -> Prompting:
    """Return how an adapter is asked if a request says nothing else.

    Args:
        provenance: Of an adapter that `open_adapter` has checked.
    """
    theirs = provenance["config"]
    config = TrainingConfig.model_validate(
        {name: theirs[name] for name in _SETTINGS if name in theirs}
    )
    return Prompting(
        thinking=was_trained_to_think(provenance),
        answer_tokens=config.max_new_tokens,
        thinking_tokens=config.max_thinking_tokens,
        escape=config.special_tokens_in_text == "escape",
    )
