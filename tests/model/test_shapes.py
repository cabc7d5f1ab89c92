"""Shapes of models: the published sizes, found by name or in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.plans import QWEN3_4B, QWEN3_14B

from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import ModelNotFoundError
from qwen3ft.model.shapes import find_shape, known_shape
from qwen3ft.model.source_folder import check_model_folder


@pytest.mark.parametrize(
    ("key", "billions", "without_embedding"),
    [
        ("0.6b", 0.6, 0.44),
        ("1.7b", 1.7, 1.4),
        ("4b", 4.0, 3.6),
        ("8b", 8.2, 6.95),
        ("14b", 14.8, 13.2),
        ("32b", 32.8, 31.2),
    ],
)
def test_shapes_have_the_parameters_that_their_models_are_published_with(
    key: str, billions: float, without_embedding: float
) -> None:
    """The counts of the model cards, with and without embeddings, to their last digit."""
    _, shape = find_shape(key)
    rest = shape.total_parameters - shape.embedding_parameters
    assert shape.total_parameters / 1e9 == pytest.approx(billions, abs=0.05)
    assert rest / 1e9 == pytest.approx(without_embedding, abs=0.05)


def test_models_are_found_by_key_hub_name_and_folder(tmp_path: Path) -> None:
    """Longer names of a known size too; others are none, and a folder needs no weights."""
    assert find_shape("4b") == ("Qwen/Qwen3-4B-Thinking-2507", QWEN3_4B)
    assert find_shape("Qwen/Qwen3-14B")[1].hidden_size == QWEN3_14B.hidden_size
    assert find_shape("Qwen/Qwen3-4B")[1].max_position_embeddings == 40960
    assert find_shape("Qwen/Qwen3-8B-Base")[1].max_position_embeddings == 32768
    assert find_shape("me/qwen3-0.6b-mine")[1].num_hidden_layers == 28
    for other in ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-VL-4B", "Qwen/Qwen3.5-4B", "Qwen/Qwen3-4Bx"):
        assert known_shape(other) is None
    values = QWEN3_14B.model_dump() | {"model_type": "qwen3", "rope_theta": 1e6}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert find_shape(str(tmp_path)) == (str(tmp_path), QWEN3_14B)
    assert find_shape("embedded")[1] == check_model_folder(MODEL_DIR)
    with pytest.raises(ModelNotFoundError, match="5b") as caught:
        find_shape("5b")
    assert "0.6b, 1.7b, 4b, 8b, 14b, 32b" in caught.value.why
