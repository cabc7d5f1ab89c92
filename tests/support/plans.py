"""Shapes, machines, workloads and plans as the planner's tests need them; nothing is on disk."""

from __future__ import annotations

import math
import random
from typing import Any

from qwen3ft.config import TrainingConfig
from qwen3ft.model.shapes import find_shape, plan_adapter
from qwen3ft.planning.plan import build_plan
from qwen3ft.planning.workload import Workload
from qwen3ft.records.data import DatasetManifest, LengthSummary
from qwen3ft.records.machine import EnvironmentReport, GpuInfo
from qwen3ft.records.model import ModelShape, ModelSnapshot, ModelSource
from qwen3ft.records.plan import MemorySettings, TrainPlan
from qwen3ft.units import GIB

QWEN3_4B = find_shape("4b")[1]
QWEN3_14B = find_shape("14b")[1]
TINY = ModelShape(
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
)


def environment(
    gpu_gb: float | None = 24.0,
    host_gb: float = 64.0,
    capability: str | None = None,
    versions: tuple[str, ...] = (),
) -> EnvironmentReport:
    """A machine with one GPU, or with none."""
    gpu = GpuInfo(
        index=0,
        name="a GPU",
        uuid="GPU-0",
        total_bytes=int((gpu_gb or 0) * GIB),
        free_bytes=0,
        driver_version="580.1",
        compute_capability=capability,
    )
    return EnvironmentReport(
        python_version="3.11",
        python_executable="python",
        platform="linux",
        versions=dict.fromkeys(versions, "3.5"),
        cpu_count=2,
        host_total_bytes=int(host_gb * GIB),
        host_free_bytes=GIB,
        disk_free_bytes=GIB,
        gpus=(gpu,) if gpu_gb else (),
    )


def hopper(gpu_gb: float | None = 80.0, host_gb: float = 64.0) -> EnvironmentReport:
    """A machine that the fused path runs on."""
    return environment(gpu_gb, host_gb, "9.0", ("triton",))


def snapshot(shape: ModelShape = QWEN3_4B, **values: Any) -> ModelSnapshot:
    """The record of a quantised model."""
    return ModelSnapshot(
        **{
            "source": ModelSource(model_name="Qwen/Qwen3-4B", revision="0" * 40),
            "path": "model",
            "manifest_sha256": "0" * 64,
            "quantization": "nf4-double",
            "compute_dtype": "bfloat16",
            "shape": shape,
            "size_bytes": 1,
            "chat_template_sha256": "0" * 64,
            **values,
        }
    )


def manifest(rows: int = 7473, longest_tokens: int = 256, **values: Any) -> DatasetManifest:
    """The record of tokenised rows of 100 tokens on average."""
    lengths = LengthSummary(
        rows=rows,
        tokens=100 * rows,
        trained_tokens=50 * rows,
        longest_tokens=longest_tokens,
        median_tokens=100,
        p95_tokens=200,
    )
    return DatasetManifest(
        **{
            "path": "data",
            "digest": "0" * 64,
            "sources": (),
            "rows_read": rows,
            "train": lengths,
            "dev": lengths.model_copy(update={"rows": 50}),
            "test_rows": 50,
            "quarantined": 0,
            "too_long": 0,
            "duplicates": 0,
            **values,
        }
    )


def plan_on(
    machine: EnvironmentReport,
    shape: ModelShape = QWEN3_4B,
    *,
    rows: int = 7473,
    longest_tokens: int = 256,
    **wanted: Any,
) -> TrainPlan:
    """The plan of a run with the settings `wanted` on `machine`."""
    config = TrainingConfig(**wanted)
    return build_plan(
        config,
        machine,
        snapshot(shape, compute_dtype="bfloat16" if machine.gpus else "float32"),
        plan_adapter(config, shape),
        manifest(rows, longest_tokens),
        run_id="run",
        run_dir="runs/run",
    )


def plan_for(
    shape: ModelShape = QWEN3_4B, *, gpu_gb: float | None = 24.0, **wanted: Any
) -> TrainPlan:
    """A plan of the plain path: on a GPU of unknown capability, or on a CPU."""
    return plan_on(environment(gpu_gb), shape, **wanted)


def workload(shape: ModelShape = QWEN3_4B, rank: int = 6, **values: Any) -> Workload:
    """A workload; memory levers go by their own names."""
    levers = {"micro_batch_size": 4, "gradient_checkpointing": True, "loss_chunk_tokens": 512}
    levers |= {name: values.pop(name) for name in MemorySettings.model_fields.keys() & values}
    defaults = {
        "device": "cuda",
        "compute_dtype": "bfloat16",
        "quantization": "nf4-double",
        "sequence_tokens": 256,
        "typical_tokens": 108,
        "step_sequences": 64,
    }
    adapter = plan_adapter(TrainingConfig(lora_r=rank), shape)
    memory = MemorySettings(**levers)
    return Workload(shape=shape, adapter=adapter, memory=memory, **{**defaults, **values})


def workload_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths as in the measured workload of the peers, at most 256 tokens."""
    draw = random.Random(seed)
    return [
        int(min(256, max(16, draw.lognormvariate(math.log(256 * 0.375), 0.6))))
        for _ in range(count)
    ]
