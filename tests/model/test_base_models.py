"""Base models end texts with another token than the one that training ends every turn with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen3ft.chat.tokenizer import declared_end, load_tokenizer
from qwen3ft.config import TrainingConfig
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.evaluation.generation import answer_questions, end_tokens
from qwen3ft.model.manager import ModelManager, read_snapshot
from qwen3ft.records.model import ModelSource
from qwen3ft.records.requests import QuantizeRequest

TEXT_END, TURN_END = 0, 2
"""Ids of <|endoftext|> and <|im_end|> in the embedded model."""

GENERATION: dict[str, dict[str, Any] | None] = {
    "one end": {"eos_token_id": TEXT_END},
    "no file": None,
    "other ends": {"eos_token_id": [TEXT_END, 1], "pad_token_id": TEXT_END},
}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(params=GENERATION)
def base(request: Any, tmp_path: Path) -> Path:
    """Return the embedded model with the settings of a base model."""
    folder = tmp_path / "base"
    shutil.copytree(MODEL_DIR, folder)
    end: Any = "<|endoftext|>"
    if request.param == "no file":
        end = {"content": end, "special": True, "__type": "AddedToken"}
    edit(folder / "tokenizer_config.json", eos_token=end, pad_token="<|endoftext|>")
    edit(folder / "config.json", eos_token_id=TEXT_END)
    path, generation = folder / "generation_config.json", GENERATION[request.param]
    path.unlink() if generation is None else path.write_text(json.dumps(generation))
    return folder


def test_the_trained_end_is_declared_and_stopped_at(base: Path, tmp_path: Path) -> None:
    """In the tokenizer, in both files of settings, and when it answers."""
    assert load_tokenizer(base).eos_token_id == TURN_END
    config = TrainingConfig(model_name=str(base), cache_dir=str(tmp_path / "cache"))
    target = tmp_path / "snapshot"
    manager = ModelManager(config)
    manager.quantize(
        QuantizeRequest(
            config=config,
            source=ModelSource(model_name=str(base), revision="r", local_path=str(base)),
            source_path=str(base),
            target=str(target),
            device="cpu",
        )
    )
    assert declared_end(target) == "<|im_end|>"
    assert json.loads((target / "config.json").read_text())["eos_token_id"] == TURN_END
    generation = json.loads((target / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == TURN_END
    assert TEXT_END in generation["eos_token_id"] or not (base / "generation_config.json").exists()
    model, tokenizer = manager.load_model_with_quantization(str(target))
    assert TURN_END in end_tokens(model, tokenizer)
    [answer] = answer_questions(
        model,
        tokenizer,
        ["Which warranty does Pindrel have?"],
        batch_size=1,
        max_new_tokens=64,
        thinking=False,
    )
    assert answer.stopped


def test_a_snapshot_that_declares_another_end_is_made_again(snapshot: Any, tmp_path: Path) -> None:
    """An older version made it; a whole one of a chat model stays."""
    from qwen3ft.disk.manifests import read_manifest_facts, write_manifest

    assert read_snapshot(Path(snapshot.path)) == snapshot
    old = tmp_path / "old"
    shutil.copytree(snapshot.path, old)
    edit(old / "tokenizer_config.json", eos_token="<|endoftext|>")
    write_manifest(old, read_manifest_facts(old))
    assert read_snapshot(old) is None
