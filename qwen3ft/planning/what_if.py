"""Plans without weights and rows: what fits a budget, from a model's shape and a machine alone.

Guarantees: pure but for reading a local folder's config.json; the settings are those that a run
with such rows would take. What is assumed where nothing is known: rows whose mean length is a share
of the longest (`TYPICAL_FILL`), and `HOST_GB` of host memory beside a card that is only named.
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
from qwen3ft.planning.speed import SpeedEstimate, estimate_speed
from qwen3ft.planning.table import kept_by_typical_row
from qwen3ft.planning.workload import FitRequest, padded_length
from qwen3ft.records.base import Record
from qwen3ft.records.machine import EnvironmentReport, GpuInfo
from qwen3ft.units import GIB, gb

TYPICAL_FILL = 0.42
"""Mean over longest row, as of the lengths in benchmarks/speed/cases.py (lognormal, cut)."""

HOST_GB = 64
BFLOAT16_CAPABILITY = 8.0


def described_machine(card: GpuSpec) -> EnvironmentReport:
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


BUDGETS_GB = (6, 8, 12, 13, 16, 24, 48, 80)

LENGTHS_TOKENS = (256, 1024, 2048, 8192, 32768, 131072)

CELL_CODES = {
    "K": "kept",
    "R": "some computed again",
    "A": "all computed again",
    "H": "in host memory",
    "P": "as the plain path does",
}
"""Code of a cell: what becomes of a typical row's activations."""


class SweepCell(Record):
    """One budget and length."""

    budget_gb: float
    sequence_tokens: int
    fits: bool
    micro_batch_size: int | None = None
    policy: str | None = None
    peak_gb: float | None = None
    tokens_per_second: float | None = None


class Sweep(Record):
    """The table of one model; speeds are estimates."""

    model: str
    card: str
    speed_basis: str
    effective_batch_size: int
    fill: float
    max_position_embeddings: int
    cells: tuple[SweepCell, ...]
    longest_tokens: dict[float, int | None]


def sweep_model(
    config: TrainingConfig,
    environment: EnvironmentReport,
    card: GpuSpec | None,
    fill: float,
    budgets_gb: Sequence[float] = BUDGETS_GB,
    lengths_tokens: Sequence[int] = LENGTHS_TOKENS,
) -> Sweep:
    """Every budget that the device has, with every length.

    Args:
        config: Model, batch and adapter; its budget and length are not used.
        environment: Real, or of `described_machine`.
        card: Where speed is estimated for; None for a device of which nothing is known.
        fill: Mean length of a row as a share of the longest.
        budgets_gb: Rows of the table.
        lengths_tokens: Columns.
    """
    device_bytes = (
        environment.gpus[0].total_bytes if environment.gpus else environment.host_total_bytes
    )
    # A card sold as one of 80 GB has a little less.
    there = [budget for budget in budgets_gb if budget * GIB <= 1.05 * device_bytes]
    cells, longest = {}, {}
    for tokens in lengths_tokens:
        for budget in there:
            request = _request(config, environment, fill, budget, tokens)
            cells[budget, tokens] = _cell(request, card, budget)
    for budget in there:
        request = _request(config, environment, fill, budget, LONGEST_TOKENS)
        budget_bytes = min(budget * GIB, device_bytes)
        longest[float(budget)] = longest_that_fits(request, kernels_of(request)[0], budget_bytes)
    request = _request(config, environment, fill, max(budgets_gb), lengths_tokens[0])
    measured = card is not None and card.measured
    return Sweep(
        model=request.model_name,
        card=environment.gpus[0].name if environment.gpus else "CPU",
        speed_basis=SpeedEstimate.describe(measured=measured) if card else "no estimate",
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


def _cell(request: FitRequest, card: GpuSpec | None, budget_gb: float) -> SweepCell:
    tokens = request.longest_tokens
    fit = fit_or_none(request)
    if fit is None:
        return SweepCell(budget_gb=budget_gb, sequence_tokens=tokens, fits=False)
    speed = card and estimate_speed(
        card,
        fit.work,
        sequences_per_step=request.config.effective_batch_size,
        typical_tokens=request.typical_tokens,
    )
    return SweepCell(
        budget_gb=budget_gb,
        sequence_tokens=tokens,
        fits=True,
        micro_batch_size=fit.work.memory.micro_batch_size,
        policy=_policy(request, fit),
        peak_gb=gb(sum(part.bytes for part in fit.parts)),
        tokens_per_second=speed.tokens_per_second if speed else None,
    )


def _policy(request: FitRequest, fit: Fit) -> str:
    if fit.work.memory.kernels == "plain":
        return "P"
    if fit.work.memory.offload_activations:
        return "H"
    levels = set(kept_by_typical_row(request, fit.work))
    if levels == {Level.KEEP_ALL}:
        return "K"
    return "A" if levels == {Level.RECOMPUTE_ALL} else "R"
