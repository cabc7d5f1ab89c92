"""Rows, a snapshot, and the data stage in one call, for its tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from qwen3ft.chat.templates import END_TOKEN
from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.config import TrainingConfig
from qwen3ft.data.pipeline import DataPipeline
from qwen3ft.data.token_table import load_split
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.model import ModelShape, ModelSnapshot, ModelSource

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"

SNAPSHOT = ModelSnapshot(
    source=ModelSource(model_name="embedded", revision="0" * 40),
    path=str(MODEL_DIR),
    manifest_sha256="1" * 64,
    quantization="nf4-double",
    compute_dtype="float32",
    shape=ModelShape(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=1536,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    ),
    size_bytes=1,
    chat_template_sha256="2" * 64,
)

disable_progress_bars()


def synthetic(count: int, start: int = 0) -> list[dict[str, str]]:
    """Return question-answer rows, every third with reasoning, every fourth in Chinese."""
    rows = []
    for number in range(start, start + count):
        asked = f"第 {number} 题:{number} 加 1?" if number % 4 == 0 else f"What is {number} + 1?"
        reasoning = f"{number} and one" if number % 3 == 0 else ""
        rows.append({"question": asked, "answer": str(number + 1), "reasoning": reasoning})
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write one row a line; return the path as the config takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepare(folder: Path, *data_paths: str, **values: Any) -> DatasetManifest:
    """Run the stage with the embedded tokenizer into `folder`/data."""
    config = TrainingConfig(model_name="embedded", data_paths=data_paths, **values)
    return DataPipeline(config).prepare(SNAPSHOT, folder / "data")


def accounted(manifest: DatasetManifest) -> int:
    """Return the number of rows that the manifest accounts for."""
    return (
        manifest.train.rows
        + manifest.dev.rows
        + manifest.test_rows
        + manifest.quarantined
        + manifest.too_long
        + manifest.duplicates
        + manifest.not_used
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the values of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained_ids(row: dict[str, Any]) -> list[int]:
    """Return the tokens of a row that carry loss."""
    edges = zip(row["trained"][::2], row["trained"][1::2], strict=True)
    return [token for start, end in edges for token in row["input_ids"][start:end]]


def questions(manifest: DatasetManifest, split: str) -> list[str]:
    """Return the questions of a split, from the tokens or from test.jsonl."""
    folder = Path(manifest.path)
    if split == "test":
        return [row["question"] for row in read_lines(folder / "test.jsonl")]
    ids = list(load_split(folder, split)["input_ids"])
    texts = load_tokenizer(MODEL_DIR).batch_decode(ids)
    return [text.split("<|im_start|>user\n")[1].split(END_TOKEN)[0] for text in texts]
