"""Defaults of a saved model: a request that sets nothing is prompted as trained, decoded as tested.

Servers read them from two files beside the weights: the chat template, and generation_config.json
(transformers, vLLM).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen3ft.chat.templates import with_thinking_default
from qwen3ft.disk.files import write_json_atomic
from qwen3ft.model.saved_adapter import (
    GENERATION_FILE,
    TEMPLATE_FILE,
    most_answer_tokens,
    was_trained_to_think,
)


def write_request_defaults(folder: Path, base: Path, provenance: dict[str, Any]) -> None:
    """Write generation_config.json, and the default for thinking into the chat template.

    Args:
        folder: An adapter or merged model; its template, if it has one, is changed in place.
        base: A folder whose generation_config.json, if any, names the special tokens.
        provenance: The adapter's.
    """
    template = folder / TEMPLATE_FILE
    if template.is_file():
        thinking = was_trained_to_think(provenance)
        text = with_thinking_default(template.read_text(encoding="utf-8"), thinking)
        template.write_text(text, encoding="utf-8")
    stored = base / GENERATION_FILE
    found = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    settings: dict[str, Any] = {key: found[key] for key in found if key.endswith("_token_id")}
    # Greedy, as in the test: transformers goes by do_sample, vLLM by the temperature.
    settings |= {"do_sample": False, "temperature": 0.0}
    settings["max_new_tokens"] = most_answer_tokens(provenance)
    write_json_atomic(folder / GENERATION_FILE, settings)
