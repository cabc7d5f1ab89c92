"""The ability set is bundled, or the one that the config names."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import read_json_lines
from qwen3ft.embedded import DATA_DIR, corpus
from qwen3ft.errors import DataLoadingError
from qwen3ft.evaluation.ability import read_ability_rows


def test_the_general_rows_are_in_both_languages() -> None:
    """Each row has a unique question, an answer and a kind."""
    rows = read_ability_rows(TrainingConfig())
    assert len({row["question"] for row in rows}) == len(rows) == 48
    assert all(row["kind"] for row in rows)
    chinese = sum("\u4e00" <= row["question"][-2] <= "\u9fff" for row in rows)
    assert 15 <= chinese <= 30


def test_the_embedded_rows_are_what_pretraining_taught() -> None:
    """The generator reproduces them, and no run trains or tests on them."""
    rows = read_ability_rows(TrainingConfig(model_name="embedded"))
    assert rows == corpus.draw_ability_rows()
    asked = {row["question"] for path in DATA_DIR.glob("*.jsonl") for row in read_json_lines(path)}
    assert not asked & {row["question"] for row in rows}


def test_a_custom_set_is_used(tmp_path: Path) -> None:
    """It is a file with one JSON object per line."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n', encoding="utf-8")
    config = TrainingConfig(ability_path=str(path))
    assert read_ability_rows(config) == [{"question": "q", "answer": "a"}]


@pytest.mark.parametrize("content", [None, "", "no json\n", "[1]\n", '{"question": "q"}\n'])
def test_an_unusable_set_is_refused_before_anything_is_loaded(
    tmp_path: Path, content: str | None
) -> None:
    """Without it, the gate would promote a model that forgot everything."""
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataLoadingError, match="cannot be used"):
        read_ability_rows(TrainingConfig(ability_path=str(path)))
