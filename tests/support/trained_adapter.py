"""A small adapter, trained on a copy of the embedded model, for tests that use one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
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
from qwen3ft.records.model import ModelSnapshot, SavedAdapter
from qwen3ft.records.requests import QuantizeRequest

ROWS, STEPS = 16, 40
EARLY_STEP = 6


@dataclass(frozen=True)
class Trained:
    """A run's result: an adapter that has learnt its rows by heart, an early one, and their base.

    The adapter's checkpoint is `checkpoint`; the early one's is beside it.
    """

    config: TrainingConfig
    base: Path
    snapshot: ModelSnapshot
    rows: list[dict[str, str]]
    early: SavedAdapter
    saved: SavedAdapter
    checkpoint: Path

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        return Path(self.saved.path)

    def rows_file(self, folder: Path, most: int = ROWS) -> Path:
        """Write the first rows as a file of held-out rows."""
        path, rows = folder / "test.jsonl", self.rows[:most]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
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
    batch = training_batch(tokenizer, rows)
    saved = []
    for step in range(1, STEPS + 1):
        peft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (EARLY_STEP, STEPS):
            checkpoint = write_checkpoint(peft_model, folder / f"step-{step:06d}")
            plan = make_plan(snapshot, run_id=f"night-{len(saved)}")
            saved.append(save_adapter(make_outcome(checkpoint), plan, config))
    return Trained(config, base, snapshot, rows, *saved, checkpoint)


def training_batch(tokenizer: Any, rows: Sequence[Any]) -> dict[str, Any]:
    """Return the padded batch that training makes of the rows: ids and labels."""
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
