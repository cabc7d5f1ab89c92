"""A run that trains although nothing is new says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3ft.config import TrainingConfig
from qwen3ft.operations.new_data import explain_training
from qwen3ft.records.data import DataChange
from qwen3ft.records.evaluation import Champion
from qwen3ft.records.run_card import DataSection
from qwen3ft.report.data_section import new_rows_sentence

THEIRS = TrainingConfig(model_name="embedded", data_paths=("a.jsonl",), when_unchanged="skip")
SEEN = DataChange(since="task v3", new_rows=0, unchanged=True)


@pytest.fixture
def champion(tmp_path: Path) -> Champion:
    """Return a champion whose adapter says what it was trained with."""
    provenance = {"config": THEIRS.model_dump(mode="json")}
    (tmp_path / "provenance.json").write_text(json.dumps(provenance))
    return Champion(registered_model="task", version="3", source_uri="", adapter_path=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 5}, "seed 0 -> 5"),
        ({"learning_rate": 0.001, "lora_r": 4}, "learning_rate 5e-05 -> 0.001, lora_r 6 -> 4"),
        ({"batch_size": 8}, "batch size 64 -> 128"),
        ({"when_unchanged": "train"}, "as when_unchanged is train"),
        ({"max_memory_gb": 5.0, "output_dir": "x", "name": "y"}, ""),
    ],
)
def test_what_makes_a_run_train_again_is_named(
    champion: Champion, settings: dict[str, Any], said: str
) -> None:
    """Settings that do not decide the result are no reason."""
    config = TrainingConfig.model_validate({**THEIRS.model_dump(), **settings})
    found = explain_training(SEEN, champion, config)
    assert said in found.again
    assert bool(said) == bool(found.again)
    assert found.champion_paths == ("a.jsonl",)
    section = DataSection(
        digest="", rows_read=1, went={}, train_tokens=1, since=found.since, again=found.again
    )
    assert said in new_rows_sentence(section)


def test_new_rows_are_reason_enough(champion: Champion) -> None:
    """So is the lack of a champion, or of one that says how it was made."""
    config = THEIRS.model_copy(update={"seed": 5})
    assert explain_training(DataChange(since="v3", new_rows=1), champion, config).again == ""
    assert explain_training(SEEN, None, config) == SEEN
    (Path(str(champion.adapter_path)) / "provenance.json").write_text('{"config": {"sede": 1}}')
    assert explain_training(SEEN, champion, config) == SEEN
