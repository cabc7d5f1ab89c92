"""The ability set: rows that show whether fine-tuning cost a model what it could do before.

Only the loss on their answers is measured, against the base model's; they are never trained on.

- `general.jsonl`: 48 rows in English and Chinese, written for this project: facts, explanations,
  sums, logic, translation, small talk, code. For every Qwen3.
- `embedded.jsonl`: 48 rows like those that the embedded model was pretrained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import read_json_lines
from qwen3ft.errors import DataLoadingError

GENERAL_PATH = Path(__file__).parent / "general.jsonl"
EMBEDDED_PATH = Path(__file__).parent / "embedded.jsonl"


def read_ability_rows(config: TrainingConfig) -> list[dict[str, Any]]:
    """Read the rows that `config` names; each has a question and an answer.

    Raises:
        DataLoadingError: the file cannot be read, has no rows, or a row lacks a text.
    """
    bundled = EMBEDDED_PATH if config.is_embedded else GENERAL_PATH
    path = Path(config.ability_path) if config.ability_path else bundled
    try:
        rows = read_json_lines(path)
        complete = bool(rows) and all(
            isinstance(row.get(name), str) and row[name].strip()
            for row in rows
            for name in ("question", "answer")
        )
    except (OSError, ValueError, AttributeError) as error:
        raise _unusable(path, str(error)) from error
    if not complete:
        raise _unusable(path, "it has no rows, or a row without a question or an answer")
    return rows


def _unusable(path: Path, problem: str) -> DataLoadingError:
    return DataLoadingError(
        f"The ability set {path} cannot be used: {problem}.",
        why="Without it, nothing shows whether the new adapter forgets.",
        next_command="qwen3ft run --set ability_path=null",
        path=str(path),
    )
