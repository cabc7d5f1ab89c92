"""Explain that nothing fits the budget: the least that is needed, by part, and what would fit.

Offers the least budget, the longest rows and the largest smaller Qwen3. Every offer does fit, and
comes as a command that shows so from the model's shape alone.
"""

from __future__ import annotations

import bisect
import math
import shlex
from dataclasses import dataclass, replace

from qwen3ft.errors import InsufficientMemoryError
from qwen3ft.model.shapes import KNOWN_MODELS, KnownModel, adapter_for
from qwen3ft.planning.footprint import predict_memory, total_bytes
from qwen3ft.planning.fused_search import most_frugal_fused
from qwen3ft.planning.plain_settings import most_frugal
from qwen3ft.planning.workload import TYPICAL_FILL, FitRequest, Workload
from qwen3ft.records.plan import MemoryPart
from qwen3ft.units import GIB, gb

LENGTH_STEP_TOKENS = 8
LEAST_LENGTH_TOKENS = 16
"""Smallest `max_sequence_length`."""
LONGEST_TOKENS = 262144

_SETTINGS = (
    *("lora_r", "gradient_checkpointing", "kernels", "packing", "lora_dropout"),
    *("batch_size", "gradient_accumulation_steps", "gpus", "hosts"),
)
"""Settings that memory depends on, beside model, budget and length."""


@dataclass(frozen=True)
class _Offer:
    """A value of one setting with which the run would fit."""

    setting: str
    value: float | int | str
    words: str
    command: str


def least_workload(request: FitRequest, kernels: str) -> Workload:
    """Return the most frugal settings that keep the result.

    Args:
        request: What has to fit.
        kernels: 'fused' where that path can run; the plain one is then considered too, unless the
            config asks for the fused one.
    """
    first, config = request.smallest_workload, request.config
    frugal = []
    if config.kernels != "fused":
        frugal.append(most_frugal(first.with_memory(packing=config.packing == "on")))
    if kernels == "fused":
        frugal.append(most_frugal_fused(first, request.host_bytes))
    return min(frugal, key=lambda work: total_bytes(predict_memory(work)))


def longest_that_fits(
    request: FitRequest, kernels: str, budget_bytes: float, limit_tokens: int = LONGEST_TOKENS
) -> int | None:
    """Return the longest row, a multiple of 8 tokens, that fits the budget; None if none does."""
    lengths = range(LEAST_LENGTH_TOKENS, limit_tokens + 1, LENGTH_STEP_TOKENS)
    fill = _fill(request)  # rows keep their proportion of typical to longest

    def excess_bytes(tokens: int) -> float:
        held_out = min(tokens, request.held_out_tokens)
        typical = math.ceil(fill * tokens)
        shorter = replace(
            request, longest_tokens=tokens, typical_tokens=typical, held_out_tokens=held_out
        )
        return total_bytes(predict_memory(least_workload(shorter, kernels))) - budget_bytes

    # Memory never falls with the length, so the longest that fits is found by bisection.
    fitting = bisect.bisect_right(lengths, 0.0, key=excess_bytes)
    return lengths[fitting - 1] if fitting else None


def nothing_fits(request: FitRequest, kernels: str, budget_gb: float) -> InsufficientMemoryError:
    """Return the error that says what the most frugal settings need, and what would fit."""
    parts = predict_memory(least_workload(request, kernels))
    need_gb = _rounded_up_gb(total_bytes(parts))
    offers = list(_offers(request, kernels, need_gb, budget_gb))
    width = max(len(offer.words) for offer in offers)
    table = "\n".join(f"  {offer.words:<{width}}  {offer.command}" for offer in offers)
    return InsufficientMemoryError(
        f"The most frugal settings need {need_gb:.2f} GB, the budget is {budget_gb:.2f} GB:\n"
        + _need_and_left(parts, need_gb, budget_gb),
        why=f"{request.longest_tokens:,} tokens a row, one row at a time. What would fit:\n{table}",
        next_command=_nearest(offers, request, need_gb).command,
        need_gb=need_gb,
        have_gb=budget_gb,
        parts={part.name: part.bytes for part in parts},
        would_fit={offer.setting: offer.value for offer in offers},
        commands=[offer.command for offer in offers],
    )


def _rounded_up_gb(size_bytes: int) -> float:
    return math.ceil(gb(size_bytes) * 100) / 100  # up: it is offered as a budget that fits


def _need_and_left(parts: tuple[MemoryPart, ...], need_gb: float, budget_gb: float) -> str:
    """Return a table: for each part what it needs, and what of the budget is left after it."""
    lines = [f"  {'part':<24}{'need':>11}{'left':>14}"]
    left_bytes = budget_gb * GIB
    for part in parts:
        left_bytes -= part.bytes
        row = f"  {part.name:<24}{gb(part.bytes):8.3f} GB{gb(left_bytes):11.3f} GB"
        lines.append(row)
    lines.append(f"  {'in all':<24}{need_gb:8.3f} GB{budget_gb - need_gb:11.3f} GB")
    return "\n".join(lines)


def _offers(request: FitRequest, kernels: str, need_gb: float, budget_gb: float) -> list[_Offer]:
    command = _command(request, budget_gb=need_gb)
    offers = [_Offer("max_memory_gb", need_gb, f"more memory: {need_gb:.2f} GB", command)]
    limit = request.longest_tokens - LENGTH_STEP_TOKENS
    if tokens := longest_that_fits(request, kernels, budget_gb * GIB, limit):
        words = f"shorter rows: {tokens:,} tokens"
        command = _command(request, budget_gb=budget_gb, tokens=tokens)
        offers.append(_Offer("max_sequence_length", tokens, words, command))
    if (smaller := _smaller_model(request, kernels, budget_gb)) is not None:
        model, its_gb = smaller
        words = f"smaller model: {model.key} needs {its_gb:.2f} GB"
        command = _command(request, budget_gb=budget_gb, model_name=model.hub_name)
        offers.append(_Offer("model_name", model.hub_name, words, command))
    if request.config.gradient_checkpointing == "off":
        auto = request.config.model_copy(update={"gradient_checkpointing": "auto"})
        other = replace(request, config=auto)
        if total_bytes(predict_memory(least_workload(other, kernels))) <= budget_gb * GIB:
            words = "computing again: gradient_checkpointing auto"
            command = _command(other, budget_gb=budget_gb)
            offers.append(_Offer("gradient_checkpointing", "auto", words, command))
    return offers


def _smaller_model(
    request: FitRequest, kernels: str, budget_gb: float
) -> tuple[KnownModel, float] | None:
    """Return the largest smaller Qwen3 that fits budget and length, and what it needs in GB."""
    for model in reversed(KNOWN_MODELS):
        shape = model.shape
        if (
            shape.total_parameters >= request.shape.total_parameters
            or shape.max_position_embeddings < request.longest_tokens
        ):
            continue
        other = replace(request, shape=shape, adapter=adapter_for(request.adapter, shape))
        need_bytes = total_bytes(predict_memory(least_workload(other, kernels)))
        if need_bytes <= budget_gb * GIB:
            return model, _rounded_up_gb(need_bytes)
    return None


def _nearest(offers: list[_Offer], request: FitRequest, need_gb: float) -> _Offer:
    """Return the offer to try first: more memory only where the device has it."""
    gpus = request.environment.gpus
    device_bytes = gpus[0].total_bytes if gpus else request.environment.host_total_bytes
    if need_gb * GIB > device_bytes and len(offers) > 1:
        return offers[1]
    return offers[0]


def _command(
    request: FitRequest,
    *,
    budget_gb: float,
    tokens: int | None = None,
    model_name: str | None = None,
) -> str:
    """Return the `qwen3ft plan` command with all settings that memory depends on."""
    name = model_name or request.model_name
    keys = {model.hub_name: model.key for model in KNOWN_MODELS}
    words = ["qwen3ft plan --model", shlex.quote(keys.get(name, name)), f"--budget {budget_gb:g}"]
    words.append(f"--seq {tokens or request.longest_tokens}")
    if not request.environment.gpus:
        words.append("--gpu none")
    elif not request.environment.gpus[0].uuid:
        words.append(f"--gpu {request.environment.gpus[0].name.lower().replace(' ', '-')}")
    if (fill := _fill(request)) != TYPICAL_FILL:
        words.append(f"--fill {fill:.8g}")
    defaults, wanted = type(request.config)(), request.config
    for setting in _SETTINGS:
        value = getattr(wanted, setting)
        if value != getattr(defaults, setting):
            words.append(f"--set {shlex.quote(f'{setting}={value}')}")
    if (used := request.quantization) != defaults.quantization[0]:
        words.append(f"--set {shlex.quote(f'quantization=[{used}]')}")
    return " ".join(words)


def _fill(request: FitRequest) -> float:
    """Return typical over longest length, in the fewest digits that give the typical one back."""
    longest, typical = request.longest_tokens, request.typical_tokens
    if math.ceil(TYPICAL_FILL * longest) == typical:
        return TYPICAL_FILL
    rounded = (math.floor(typical / longest * 10**digits) / 10**digits for digits in range(2, 9))
    return next((one for one in rounded if math.ceil(one * longest) == typical), typical / longest)
