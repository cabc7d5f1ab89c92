"""Measure the decoder of the inference test inside a preflight worker, after its training steps.

It is made with the planned sizes, reads the longest text, and writes a few tokens in every slot.
Its answers mean nothing; its memory and the time of a step are those of the test. What goes wrong
here leaves the measurement of training as it is: the test has rungs and a fallback of its own.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from qwen3ft.decoding.decoder import Decoder
from qwen3ft.decoding.fitting import CannotDecodeError, run_within, used_bytes
from qwen3ft.decoding.slots import Query
from qwen3ft.decoding.writer import BURST_STEPS, AnswerWriter
from qwen3ft.decoding.writing import AnswerLimits, Marks
from qwen3ft.logs import get_logger
from qwen3ft.machine.memory import MemoryOptimizer
from qwen3ft.planning.answers import sizes_text
from qwen3ft.planning.decoder_sizes import AnswerLoad, DecoderSizes
from qwen3ft.records.preflight import AnswersMeasured
from qwen3ft.units import GIB

if TYPE_CHECKING:
    from qwen3ft.records.plan import TrainPlan

logger = get_logger("preflight")


def measure_answers(model: Any, plan: TrainPlan, load: dict[str, Any]) -> AnswersMeasured:
    """Return what the decoder took.

    Args:
        model: PEFT model with the adapter that was trained; it loses its gradients.
        plan: Plan of the training.
        load: Fields of an `AnswerLoad`, without the model's shape.
    """
    work = AnswerLoad(shape=plan.model.shape, **load)
    for parameter in model.parameters():
        parameter.grad = None
    beside_bytes = used_bytes(plan.device)
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    memory, started = MemoryOptimizer(plan.max_memory_gb, plan.device), time.monotonic()
    names = list(model.peft_config) * len(work.ranks)  # each has a copy of its own
    try:
        sizes, step_seconds = run_within(
            work, plan.max_memory_gb, plan.device, lambda sizes: _fill(model, names, sizes, work)
        )
    except (CannotDecodeError, RuntimeError) as error:
        logger.warning("the decoder could not be measured: %s", error)
        return AnswersMeasured(by=f"not measured ({type(error).__name__}: {str(error)[:200]!a})")
    return AnswersMeasured(
        by=sizes_text(sizes),
        predicted_bytes=beside_bytes + work.bytes_of(sizes),
        measured_bytes=int(memory.peak()[2] * GIB),
        step_seconds=step_seconds,
        seconds=time.monotonic() - started,
    )


def _fill(model: Any, names: list[str], sizes: DecoderSizes, work: AnswerLoad) -> float:
    """Make a decoder and write a burst in every slot; return the seconds of a step."""
    decoder = Decoder(model, names, sizes, Marks(()), work.answer_tokens)
    decoder.capture(draw=True)
    decoder.hidden([[0] * max(work.read_tokens, work.prompt_tokens)], [0])
    prompt = [0] * max(1, int(work.typical_prompt_tokens))
    limits = AnswerLimits(BURST_STEPS, seed=0)
    queries = [Query(prompt, limits, slot % len(names)) for slot in range(sizes.slots)]
    for _ in AnswerWriter(decoder, queries).run():
        pass
    started = time.perf_counter()
    decoder.step(draw=True)
    if decoder.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
