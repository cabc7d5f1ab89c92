"""A small adapter, trained on a copy of the embedded model, for tests that use one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.finished_run import attach_lora, make_outcome, make_plan, write_checkpoint

from qwen3ft.chat.rendering import tokenize_rows
from qwen3ft.config import TrainingConfig
from qwen3ft.embedded import DATA_DIR, MODEL_DIR
from qwen3ft.model.hub import resolve_model
from qwen3ft.model.manager import ModelManager
from qwen3ft.model.save_adapter import save_adapter
from qwen3ft.records.requests import QuantizeRequest

ROWS, STEPS = 16, 40


@dataclass(frozen=True)
class Trained:
    """A run's result: an adapter that has learnt its rows by heart, and its base model."""

    config: TrainingConfig
    base: Path
    adapter: Path
    rows: list[dict[str, str]]

    def rows_file(self, folder: Path) -> Path:
        """Write the rows as a file of held-out rows."""
        path = folder / "test.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        return path


def train_adapter(folder: Path) -> Trained:
    """Train on a copy of the embedded model, which a test may then change."""
    import torch

    torch.manual_seed(0)
    base = Path(shutil.copytree(MODEL_DIR, folder / "base"))
    config = TrainingConfig(
        model_name=str(base),
        output_dir=str(folder / "out"),
        cache_dir=str(folder / "cache"),
        runs_dir=str(folder / "runs"),
        max_new_tokens=16,
        max_memory_gb=4.0,
        stall_seconds=240.0,
    )
    source = resolve_model(config)
    snapshot = ModelManager(config).quantize(
        QuantizeRequest(
            config=config,
            source=source,
            source_path=str(base),
            target=str(folder / "snapshot"),
            device="cpu",
        )
    )
    model, tokenizer = ModelManager(config).load_model_with_quantization(snapshot.path)
    lines = (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    rows = [json.loads(line) for line in lines]
    peft_model = attach_lora(model).train()
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    batch = _batch(tokenizer, rows)
    for _ in range(STEPS):
        peft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint = write_checkpoint(peft_model, folder / f"step-{STEPS:06d}")
    saved = save_adapter(make_outcome(checkpoint), make_plan(snapshot, run_id="night-1"), config)
    return Trained(config, base, Path(saved.path), rows)


def _batch(tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    import torch

    encoded = tokenize_rows(tokenizer, rows)
    width = max(len(row.input_ids) for row in encoded)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for index, row in enumerate(encoded):
        ids[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        for start, end in row.trained:
            labels[index, start:end] = ids[index, start:end]
    return {"input_ids": ids, "labels": labels}
