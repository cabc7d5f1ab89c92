"""Plan without weights and rows: what fits a budget, from a model's shape and a machine alone.

The settings are those that a run with such rows would take. Assumed: rows whose mean length is
`TYPICAL_FILL` of the longest, and `HOST_GB` of host memory beside a GPU that is only named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qwen3ft.config import TrainingConfig
from qwen3ft.model.shapes import find_shape, plan_adapter
from qwen3ft.planning.fit import Fit, fit_or_none, kernels_of
from qwen3ft.planning.gpu_specs import GpuSpec
from qwen3ft.planning.recompute import Level
from qwen3ft.planning.refusal import LONGEST_TOKENS, longest_that_fits
from qwen3ft.planning.speed import describe_basis, typical_levels
from qwen3ft.planning.table import speed_of
from qwen3ft.planning.workload import TYPICAL_FILL, FitRequest, padded_length
from qwen3ft.records.base import Record
from qwen3ft.records.machine import EnvironmentReport, GpuInfo
from qwen3ft.units import GIB, gb

HOST_GB = 64
BFLOAT16_CAPABILITY = 8.0


def described_machine(gpu: GpuSpec, count: int = 1) -> EnvironmentReport:
    """Return a machine with GPUs of this kind; they have no UUID, since nobody looked at them."""
    size_bytes = int(gpu.memory_gb * GIB)
    device = GpuInfo(
        index=0,
        name=gpu.name,
        uuid="",
        total_bytes=size_bytes,
        free_bytes=size_bytes,
        driver_version="",
        compute_capability=gpu.capability,
    )
    return EnvironmentReport(
        python_version="",
        python_executable="",
        platform="",
        versions={"triton": ""},  # torch's wheels for Linux bring it
        cpu_count=1,
        host_total_bytes=HOST_GB * GIB,
        host_free_bytes=HOST_GB * GIB,
        disk_free_bytes=0,
        gpus=(device,) * count,
    )


def shape_request(
    config: TrainingConfig, environment: EnvironmentReport, fill: float = TYPICAL_FILL
) -> FitRequest:
    """Return the request of a run whose rows are as long as `config` allows.

    Args:
        config: The settings; `model_name` may be a key such as '4b'.
        environment: A real machine, or one of `described_machine`.
        fill: Mean length of a row as a share of the longest.

    Raises:
        ModelNotFoundError: The model is unknown, and not a folder.
        ConfigError: The folder's config.json is not a Qwen3's, or the rank is too high.
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


BUDGETS_GB = (6, 8, 12, 13, 16, 24, 48, 80)

LENGTHS_TOKENS = (256, 1024, 2048, 8192, 32768, 131072)

CELL_CODES = {
    "K": "kept",
    "R": "some computed again",
    "A": "all computed again",
    "H": "in host memory",
    "P": "as the plain path does",
}
"""Codes of a cell: where the activations of a typical row go."""


class SweepCell(Record):
    """One budget and one length of rows."""

    budget_gb: float
    sequence_tokens: int
    fits: bool
    micro_batch_size: int | None = None
    policy: str | None = None
    peak_gb: float | None = None
    tokens_per_second: float | None = None


class Sweep(Record):
    """Table of one model, budgets by lengths; speeds are estimates."""

    model: str
    gpu: str
    speed_basis: str
    effective_batch_size: int
    fill: float
    max_position_embeddings: int
    cells: tuple[SweepCell, ...]
    longest_tokens: dict[float, int | None]


def sweep_model(
    config: TrainingConfig,
    environment: EnvironmentReport,
    gpu: GpuSpec | None,
    fill: float,
    budgets_gb: Sequence[float] = BUDGETS_GB,
    lengths_tokens: Sequence[int] = LENGTHS_TOKENS,
) -> Sweep:
    """Plan every budget that the device has with every length.

    Args:
        config: Model, batch and adapter; its budget and length are not used.
        environment: A real machine, or one of `described_machine`.
        gpu: The GPU that speed is estimated for; None for an unknown device.
        fill: Mean length of a row as a share of the longest.
        budgets_gb: Rows of the table.
        lengths_tokens: Columns of the table.
    """
    device_bytes = (
        environment.gpus[0].total_bytes if environment.gpus else environment.host_total_bytes
    )
    # A GPU sold as one of 80 GB has a little less.
    there = [budget for budget in budgets_gb if budget * GIB <= 1.05 * device_bytes]
    cells, longest = {}, {}
    for tokens in lengths_tokens:
        for budget in there:
            request = _request(config, environment, fill, budget, tokens)
            cells[budget, tokens] = _cell(request, gpu, budget)
    for budget in there:
        request = _request(config, environment, fill, budget, LONGEST_TOKENS)
        budget_bytes = min(budget * GIB, device_bytes)
        longest[float(budget)] = longest_that_fits(request, kernels_of(request)[0], budget_bytes)
    request = _request(config, environment, fill, max(budgets_gb), lengths_tokens[0])
    measured = gpu is not None and gpu.measured
    return Sweep(
        model=request.model_name,
        gpu=environment.gpus[0].name if environment.gpus else "CPU",
        speed_basis=describe_basis(measured=measured) if gpu else "no estimate",
        effective_batch_size=config.effective_batch_size,
        fill=fill,
        max_position_embeddings=request.shape.max_position_embeddings,
        cells=tuple(cells[budget, tokens] for budget in there for tokens in lengths_tokens),
        longest_tokens=longest,
    )


def _request(
    config: TrainingConfig,
    environment: EnvironmentReport,
    fill: float,
    budget_gb: float,
    tokens: int,
) -> FitRequest:
    asked = {"max_memory_gb": float(budget_gb), "max_sequence_length": tokens}
    return shape_request(config.model_copy(update=asked), environment, fill)


def _cell(request: FitRequest, gpu: GpuSpec | None, budget_gb: float) -> SweepCell:
    tokens = request.longest_tokens
    fit = fit_or_none(request)
    if fit is None:
        return SweepCell(budget_gb=budget_gb, sequence_tokens=tokens, fits=False)
    speed = speed_of(fit.work, gpu)
    return SweepCell(
        budget_gb=budget_gb,
        sequence_tokens=tokens,
        fits=True,
        micro_batch_size=fit.work.memory.micro_batch_size,
        policy=_policy(fit),
        peak_gb=gb(sum(part.bytes for part in fit.parts)),
        tokens_per_second=speed.tokens_per_second if speed else None,
    )


def _policy(fit: Fit) -> str:
    if fit.work.memory.kernels == "plain":
        return "P"
    if fit.work.memory.offload_activations:
        return "H"
    levels = set(typical_levels(fit.work))
    if levels == {Level.KEEP_ALL}:
        return "K"
    return "A" if levels == {Level.RECOMPUTE_ALL} else "R"
