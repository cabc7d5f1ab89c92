"""General questions that show whether fine-tuning cost a model what it knew: the base-ability set.

48 rows in English and Chinese, written for this project: facts, explanations, sums, logic,
translation, small talk, code. Only the loss on their answers is measured, relative to the base
model's, so they say something about any Qwen3, however little it knows. Never trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3ft.storage import read_json_lines

ABILITY_PATH = Path(__file__).parent / "rows.jsonl"


def ability_rows() -> list[dict[str, Any]]:
    """The rows: question, answer, kind."""
    return read_json_lines(ABILITY_PATH)[0]
