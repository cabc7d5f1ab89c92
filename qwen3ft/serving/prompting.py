"""An adapter's own way of being asked: as its run trained and tested it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from qwen3ft.config import TrainingConfig
from qwen3ft.model.saved_adapter import was_trained_to_think
from qwen3ft.records.provenance import TAKEN_OVER
from qwen3ft.records.serving import Prompting


def with_settings_of_the_run(
    config: TrainingConfig, provenance: dict[str, Any], but: Collection[str] = ()
) -> TrainingConfig:
    """Return `config` with the settings of the run by which its adapter is asked.

    Args:
        config: Settings of this machine.
        provenance: Of an adapter that `open_adapter` has checked.
        but: Settings that stay as they are in `config`.
    """
    theirs, names = provenance["config"], [name for name in TAKEN_OVER if name not in but]
    return config.model_copy(update={name: theirs[name] for name in names if name in theirs})


def trained_prompting(provenance: dict[str, Any]) -> Prompting:
    """Return how an adapter is asked if a request says nothing else.

    Args:
        provenance: Of an adapter that `open_adapter` has checked.
    """
    config = with_settings_of_the_run(TrainingConfig(), provenance)
    return Prompting(
        thinking=was_trained_to_think(provenance),
        answer_tokens=config.max_new_tokens,
        thinking_tokens=config.max_thinking_tokens,
        escape=config.special_tokens_in_text == "escape",
    )
