"""Plan the inference test: what answers, its sizes, its peak and its time.

Assumed: base, candidate and champion answer, and none of their answers is known. A model says twice
what a reference says, since it stops later while it is not trained; a question that it may think
about takes half of its thinking budget.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qwen3ft.config import TrainingConfig
from qwen3ft.machine.gpu_choice import rank_count
from qwen3ft.planning.decoder_sizes import AnswerLoad, DecoderSizes, choose_sizes, may_decode
from qwen3ft.planning.fused_search import why_not_fused
from qwen3ft.planning.gpu_specs import GpuSpec
from qwen3ft.planning.workload import FitRequest, request_for
from qwen3ft.records.base import Record
from qwen3ft.records.data import DatasetManifest
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.plan import MemoryPart, TrainPlan
from qwen3ft.records.run_card import SettingLine
from qwen3ft.units import GIB, size_text

SAMPLED_QUESTIONS = 100
"""Questions that are also answered by sampling: greedy answers hide what a model says often."""

MODELS_ASKED = 3

THINKING_SHARE = 0.5
"""Expected thinking as a share of its budget."""

_LOADED = ("4-bit weights", "quantisation constants", "embeddings and norms", "process")
"""Parts of a plan that the decoder stands beside."""


class AnswersPlan(Record):
    """The inference test as planned; a seconds estimate leaves out loading the model.

    `most_seconds` is the estimate for answers that all take as many tokens as they may.
    """

    answered_by: str
    questions: int
    answer_tokens: int
    thinking_tokens: int
    about_thinking: str
    ranks: int = 1
    slots: int = 0
    peak_bytes: int | None = None
    seconds: float | None = None
    most_seconds: float | None = None


def expected_tokens(reference_tokens: float, most: int, thinking_tokens: float) -> float:
    """Return the expected mean length of an answer.

    Args:
        reference_tokens: Mean tokens of a reference, reasoning included.
        most: Most tokens of an answer, thinking included.
        thinking_tokens: Mean budget for thinking; 0 where nothing is asked to think.
    """
    return min(most, max(2 * reference_tokens + 16, THINKING_SHARE * thinking_tokens))


def plan_answers(
    request: FitRequest,
    parts: tuple[MemoryPart, ...],
    budget_gb: float,
    gpu: GpuSpec | None,
    dataset: DatasetManifest | None = None,
) -> AnswersPlan:
    """Return the plan of the inference test.

    Args:
        request: The request that training was planned for.
        parts: Predicted memory of training.
        budget_gb: Budget of the process.
        gpu: The GPU that time is estimated for; None for no estimate.
        dataset: The rows; None to assume as many questions as the settings allow.
    """
    config = request.config
    rows = config.inference_rows if dataset is None else dataset.test_rows
    questions = min(rows, config.inference_rows)
    share, about = _thinking(request, dataset)
    thinking = config.max_thinking_tokens if share else 0
    plan = AnswersPlan(
        answered_by="transformers: " + (_obstacle(request) or "the decoder does not fit"),
        questions=questions,
        answer_tokens=config.max_new_tokens,
        thinking_tokens=thinking,
        about_thinking=about,
    )
    if _obstacle(request):
        return plan
    load = _load(request, questions, thinking, share, dataset)
    beside = sum(part.bytes for part in parts if part.name in _LOADED)
    beside += MODELS_ASKED * 4 * request.adapter.trainable_parameters
    room_bytes = int(budget_gb * GIB) - beside
    sizes = choose_sizes(load, room_bytes)
    if sizes is None:
        return plan
    ranks = rank_count(request.config, request.environment)
    most_tokens = config.max_new_tokens + share * thinking  # no reasoning, no budget for it
    longest = dataclasses.replace(load, typical_answer_tokens=most_tokens)
    for_longest = choose_sizes(longest, room_bytes) or sizes
    return plan.model_copy(
        update={
            "answered_by": sizes_text(sizes, ranks),
            "ranks": ranks,
            "slots": sizes.slots,
            "peak_bytes": beside + load.bytes_of(sizes),
            "seconds": load.seconds(sizes, gpu, ranks) if gpu else None,
            "most_seconds": longest.seconds(for_longest, gpu, ranks) if gpu else None,
        }
    )


def decoder_load(
    config: TrainingConfig, environment: EnvironmentReport, plan: TrainPlan
) -> dict[str, Any] | None:
    """Return the fields of the decoder's work but for the shape; None if transformers answers."""
    request = request_for(config, environment, plan.model, plan.adapter, plan.dataset)
    if _obstacle(request):
        return None
    questions = min(plan.dataset.test_rows, config.inference_rows)
    share, _ = _thinking(request, plan.dataset)
    thinking = config.max_thinking_tokens if share else 0
    load = _load(request, questions, thinking, share, plan.dataset)
    fields = {field.name: getattr(load, field.name) for field in dataclasses.fields(load)}
    del fields["shape"]
    return fields


def sizes_text(sizes: DecoderSizes, ranks: int = 1) -> str:
    """Describe the decoder of each rank."""
    each = f", on each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"the decoder: {sizes.slots} slots, {sizes.pages:,} pages, "
        f"{sizes.resident_blocks} blocks kept in 16 bits{each}"
    )


def answer_lines(plan: AnswersPlan) -> list[SettingLine]:
    """Return the lines of a plan's table."""
    time = "" if plan.seconds is None else f", about {plan.seconds:,.0f} s for three models"
    if plan.seconds and plan.most_seconds and plan.most_seconds > 2 * plan.seconds:
        time += f" ({plan.most_seconds:,.0f} s if every answer takes all its tokens)"
    peak = "" if plan.peak_bytes is None else f", up to {size_text(plan.peak_bytes)}"
    thinking = f"{plan.thinking_tokens:,} + " if plan.thinking_tokens else ""
    return [
        SettingLine(
            name="answers",
            value=f"{plan.questions:,} x {thinking}{plan.answer_tokens:,} tokens",
            why=f"{plan.answered_by}{peak}{time}.",
        ),
        SettingLine(
            name="thinking",
            value=f"{plan.thinking_tokens:,} tokens" if plan.thinking_tokens else "not asked for",
            why=plan.about_thinking,
        ),
    ]


def _obstacle(request: FitRequest) -> str:
    device, kernels = request.environment.device, request.config.kernels
    if not may_decode(device, kernels):
        return "kernels is 'plain'" if kernels == "plain" else "there is no GPU"
    if device == "cpu":
        return ""
    why = why_not_fused(request.environment, request.compute_dtype, request.adapter)
    return (why or "").rstrip(".")


def _thinking(request: FitRequest, dataset: DatasetManifest | None) -> tuple[float, str]:
    """Return the share of questions before which models may think, and why."""
    ends = "when it is spent, the end of the thinking is written, and the model answers."
    if dataset is None:
        if "thinking" in request.model_name.lower():
            return 1.0, f"max_thinking_tokens, for a Thinking model and rows with reasoning; {ends}"
        return 0.0, "Rows with reasoning would be asked with max_thinking_tokens."
    if not request.may_think:
        return 0.0, "This model's chat template has no thinking."
    share = dataset.reasoning_rows / max(1, dataset.usable_rows)
    if not share:
        return 0.0, "No row has reasoning: models are asked to answer at once, as in training."
    return share, f"max_thinking_tokens, for the {share:.0%} of rows that have reasoning; {ends}"


def _load(
    request: FitRequest,
    questions: int,
    thinking_tokens: int,
    share: float,
    dataset: DatasetManifest | None,
) -> AnswerLoad:
    """Return the work of three models."""
    if dataset is None:
        references, typical = request.typical_tokens / 2, float(request.typical_tokens)
        longest = request.longest_tokens
    else:
        train = dataset.train
        references, typical = train.trained_tokens / train.rows, train.tokens / train.rows
        longest = max(train.longest_tokens, dataset.dev.longest_tokens)
    most = request.config.max_new_tokens + thinking_tokens + 8
    return AnswerLoad(
        shape=request.shape,
        ranks=(request.adapter.r,) * (MODELS_ASKED - 1),
        questions=MODELS_ASKED * (questions + min(questions, SAMPLED_QUESTIONS)),
        prompt_tokens=longest,
        typical_prompt_tokens=max(1.0, typical - references),
        answer_tokens=most,
        typical_answer_tokens=expected_tokens(references, most, share * thinking_tokens),
        read_tokens=longest,
        compute_bytes=2 if request.compute_dtype == "bfloat16" else 4,
    )
