"""Measures a contestant while it trains: time, real tokens, losses and the allocator's peaks.

Imported in a contestant's process, after packages such as Unsloth that must come first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.speed.cases import FIRST_TOKEN, TOKENS
from qwen3ft.units import GIB


class Clock(TrainerCallback):
    """Times optimizer steps from the synchronised end of step `warmup` to that of the last step.

    Args:
        warmup: Steps before the steady state.
        started: Wall-clock time at which the process was started.
        drain: Returns the real tokens of the step that just ended, as numbers or tensors.
    """

    def __init__(self, warmup: int, started: float, drain: Callable[[], list[Any]]) -> None:
        self.warmup = warmup
        self.started = started
        self.drain = drain
        self.losses: list[float] = []
        self.first_step_seconds: float | None = None
        self.load_peak: float | None = None
        self.peaks: tuple[float | None, float | None] = (None, None)
        self.seconds = 0.0
        self._tokens: list[list[Any]] = []
        self._micro_batches = [1]
        self._warm_at = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the peak of loading; later peaks are training's."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.load_peak = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        if self.warmup == 0:
            self._warm_at = time.perf_counter()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count a micro-batch that is not the last of its step."""
        self._micro_batches[-1] += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the step; wait for the device only where a time is taken."""
        self._tokens.append(self.drain())
        self._micro_batches.append(1)
        step = state.global_step
        if step == 1:
            _synchronize()
            self.first_step_seconds = time.time() - self.started
        if step == self.warmup:
            _synchronize()
            self._warm_at = time.perf_counter()
        if step == state.max_steps:
            _synchronize()
            self.seconds = time.perf_counter() - self._warm_at
            if torch.cuda.is_available():
                self.peaks = (
                    torch.cuda.max_memory_allocated() / GIB,
                    torch.cuda.max_memory_reserved() / GIB,
                )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Keep the loss of the step."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def result(self) -> dict[str, Any]:
        """Return what was measured.

        Raises:
            RuntimeError: A step had no tokens, or nothing was timed.
        """
        tokens = [int(sum(int(count) for count in step)) for step in self._tokens]
        if not tokens or min(tokens) == 0 or self.seconds <= 0:
            raise RuntimeError(f"tokens per step: {tokens}, timed: {self.seconds} s")
        timed = tokens[self.warmup :]
        weights = list(zip(self.losses, tokens, strict=False))
        return {
            "tokens_per_second": sum(timed) / self.seconds,
            "seconds_per_step": self.seconds / len(timed),
            "first_step_seconds": self.first_step_seconds,
            "peak_allocated_gb": self.peaks[0],
            "peak_reserved_gb": self.peaks[1],
            "load_peak_allocated_gb": self.load_peak,
            "step_tokens": tokens,
            "micro_batches": self._micro_batches[:-1],
            "timed_tokens": sum(timed),
            "timed_seconds": self.seconds,
            "losses": self.losses,
            "loss": self.losses[-1] if self.losses else None,
            "mean_loss": sum(loss * count for loss, count in weights) / sum(tokens),
        }


class EmbeddedTokens:
    """Counts the real tokens that reach a model's embedding.

    Works alike for trainers that pad and that pack. Padding is never one of the workload's ids.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._counts: list[torch.Tensor] = []
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input"]
        real = ids.ge(FIRST_TOKEN) & ids.lt(TOKENS)
        self._counts.append(real.sum())  # stays on the device, so nothing waits

    def drain(self) -> list[Any]:
        """Return the counts of the micro-batches since the last call."""
        counts, self._counts = self._counts, []
        return counts


def cap_memory(cap_gb: float) -> None:
    """Limit torch's allocator to `cap_gb`, not counting the CUDA context."""
    if torch.cuda.is_available():
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * GIB / total_bytes))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
