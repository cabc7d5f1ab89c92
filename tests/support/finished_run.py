"""A finished training attempt to save and test: real records around a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen3ft.disk.manifests import write_manifest
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.model.shapes import count_adapter_parameters
from qwen3ft.model.source_folder import check_model_folder
from qwen3ft.records.data import DatasetManifest, DataSource, LengthSummary
from qwen3ft.records.model import PROJECTIONS, AdapterSpec, ModelSnapshot, ModelSource
from qwen3ft.records.plan import MemorySettings, TrainPlan
from qwen3ft.records.training import AttemptOutcome

RANK = 4


def local_source() -> ModelSource:
    """Return the embedded model as a pinned source."""
    return ModelSource(model_name="embedded", revision="0" * 64, local_path=str(MODEL_DIR))


def make_snapshot(path: Path = MODEL_DIR, **changes: Any) -> ModelSnapshot:
    """Return the record of a quantised model at `path`."""
    values: dict[str, Any] = {
        "source": local_source(),
        "path": str(path),
        "manifest_sha256": "1" * 64,
        "quantization": "nf4-double",
        "compute_dtype": "float32",
        "shape": check_model_folder(MODEL_DIR),
        "size_bytes": 1,
        "chat_template_sha256": "2" * 64,
    }
    return ModelSnapshot(**{**values, **changes})


def make_plan(model: ModelSnapshot, **changes: Any) -> TrainPlan:
    """Return the plan of one attempt on `model`."""
    lengths = LengthSummary(
        rows=10,
        tokens=100,
        trained_tokens=50,
        longest_tokens=12,
        median_tokens=10,
        p95_tokens=12,
    )
    dataset = DatasetManifest(
        path="data",
        digest="3" * 64,
        sources=(DataSource(path="train.jsonl", sha256="4" * 64, rows=30, role="train"),),
        rows_read=30,
        train=lengths,
        dev=lengths,
        test_rows=10,
        quarantined=0,
        too_long=0,
        duplicates=0,
    )
    adapter = AdapterSpec(
        r=RANK,
        alpha=2 * RANK,
        dropout=0.0,
        target_modules=PROJECTIONS,
        trainable_parameters=count_adapter_parameters(model.shape, RANK),
        total_parameters=model.shape.total_parameters,
    )
    values: dict[str, Any] = {
        "attempt": 1,
        "run_id": "bright-otter",
        "run_dir": "runs/bright-otter",
        "model": model,
        "adapter": adapter,
        "dataset": dataset,
        "device": "cpu",
        "max_memory_gb": 4.0,
        "memory": MemorySettings(
            micro_batch_size=4,
            eval_batch_size=4,
            gradient_checkpointing=False,
            loss_chunk_tokens=64,
        ),
        "effective_batch_size": 4,
        "max_sequence_length": 64,
        "learning_rate": 4e-3,
        "lr_scheduler": "linear",
        "warmup_steps": 1,
        "total_steps": 10,
        "num_epochs": 1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "evaluate_every_steps": 5,
        "early_stopping_patience": 1,
        "keep_checkpoints": 2,
        "seed": 0,
        "stall_seconds": 60.0,
        "predicted": (),
        "reasons": {},
    }
    return TrainPlan(**values).with_settings(**changes)


def make_outcome(checkpoint: Path) -> AttemptOutcome:
    """Return the outcome of the attempt that wrote `checkpoint`."""
    return AttemptOutcome(
        attempt=1,
        attempt_dir=str(checkpoint.parent),
        best_checkpoint=str(checkpoint),
        best_step=10,
        best_held_out_loss=0.5,
        first_held_out_loss=2.0,
        last_step=10,
        epochs=1.0,
        final_loss=0.4,
        stopped_early=False,
        peak_memory_gb=0.5,
        peak_allocated_gb=0.0,
        peak_reserved_gb=0.0,
        tokens_per_second=100.0,
        seconds=1.0,
    )


def attach_lora(model: Any, rank: int = RANK) -> Any:
    """Attach a PEFT adapter, by default of the plan's rank, to all seven projections."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"
        ),
    )


def write_checkpoint(peft_model: Any, folder: Path) -> Path:
    """Write a checkpoint as the trainer does: the adapter by PEFT, then the manifest."""
    peft_model.save_pretrained(folder)
    write_manifest(folder, {"step": 10})
    return folder
