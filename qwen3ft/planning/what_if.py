"""Plans without weights and rows: what fits a budget, from a model's shape and a machine alone.

Guarantees: pure but for reading a local folder's config.json; the settings are those that a run
with such rows would take. What is assumed where nothing is known: rows whose mean length is a share
of the longest (`TYPICAL_FILL`), and `HOST_GB` of host memory beside a card that is only named.
"""

from __future__ import annotations

import math

from qwen3ft.config import TrainingConfig
from qwen3ft.model.shapes import find_shape, plan_adapter
from qwen3ft.planning.gpu_specs import Card
from qwen3ft.planning.workload import FitRequest, padded_length
from qwen3ft.records.plan import GIB, EnvironmentReport, GpuInfo

TYPICAL_FILL = 0.42
"""Mean over longest row, as of the lengths in benchmarks/speed_cases.py (lognormal, cut)."""

HOST_GB = 64
BFLOAT16_CAPABILITY = 8.0


def described_machine(card: Card) -> EnvironmentReport:
    """A machine with one `card` that nobody has looked at: its GPU has no UUID."""
    size_bytes = int(card.memory_gb * GIB)
    gpu = GpuInfo(
        index=0,
        name=card.name,
        uuid="",
        total_bytes=size_bytes,
        free_bytes=size_bytes,
        driver_version="",
        compute_capability=card.capability,
    )
    return EnvironmentReport(
        python_version="",
        python_executable="",
        platform="",
        versions={"triton": ""},
        cpu_count=1,
        host_total_bytes=HOST_GB * GIB,
        host_free_bytes=HOST_GB * GIB,
        disk_free_bytes=0,
        gpus=(gpu,),
    )


def shape_request(
    config: TrainingConfig, environment: EnvironmentReport, fill: float = TYPICAL_FILL
) -> FitRequest:
    """What has to fit when rows are as long as `config` allows.

    Args:
        config: Its `model_name` may be a key such as '4b'.
        environment: Real, or of `described_machine`.
        fill: Mean length of a row as a share of the longest.

    Raises:
        ModelNotFoundError: the model is no known one and no folder.
        ConfigError: the folder's config.json is no Qwen3's, or the rank is too high.
    """
    name, shape = find_shape(config.model_name)
    adapter = plan_adapter(config, shape)
    has_bfloat16 = bool(environment.gpus) and (
        float(environment.gpus[0].compute_capability or 0) >= BFLOAT16_CAPABILITY
    )
    longest = padded_length(config.max_sequence_length, config.max_sequence_length)
    return FitRequest(
        config=config,
        environment=environment,
        model_name=name,
        shape=shape,
        compute_dtype="bfloat16" if has_bfloat16 else "float32",
        quantization=config.quantization[0],
        adapter=adapter,
        longest_tokens=longest,
        typical_tokens=max(1, math.ceil(fill * config.max_sequence_length)),
        held_out_tokens=longest,
    )
