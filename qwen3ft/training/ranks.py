"""The ranks of one job: processes that each train a share of every optimizer step, or answer.

All ranks hold the same weights, optimizer and state, and compute the same updates, since the sum of
their gradients has the same bits everywhere: every number is summed in the order of ranks, on one
of them. Only what a rank alone knows passes between them: gradients once a step, and a few numbers
before each step and after an evaluation.

A training in one process has no `Ranks`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen3ft.disk.digests import code_digest
from qwen3ft.disk.files import sha256_json
from qwen3ft.errors import EnvironmentNotReadyError, OutOfMemoryError, RanksPartedError
from qwen3ft.jobs.failures import translate
from qwen3ft.machine.network import INTERFACE_VARIABLES
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.training.batches import MicroBatch, real_tokens, trained_tokens

LAST_EXCHANGES = 64
"""Exchanges whose time is kept."""

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"

NCCL_SETTINGS = {
    # Buffers for multicast and for the many channels of a large model take memory of the budget;
    # 50 MB a step need neither.
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MAX_P2P_NCHANNELS": "4",
}
"""Environment of NCCL, where the user has not set it; it reads them when the ranks meet."""


class Ranks:
    """This process among the ranks of a training.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._device = "cpu"
        self._exchanges: deque[tuple[Any, Any]] = deque(maxlen=LAST_EXCHANGES)
        self._nothing_queued: deque[bool] = deque(maxlen=LAST_EXCHANGES)
        self._buffers: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]] | None = None

    def meet(
        self, job: TrainPlan | InferenceRequest, meeting_place: Path, *, gradients: bool = True
    ) -> None:
        """Connect this process with the other ranks of the job.

        Args:
            job: What they share.
            meeting_place: File in a private folder through which the ranks find each other.
            gradients: They will exchange gradients, on their GPUs if each has its own.

        Raises:
            RanksPartedError: another rank has ended.
            EnvironmentNotReadyError: another rank has another version or plan.
        """
        # A file, not a port: whoever reaches torch's store can make its clients execute code, and
        # it listens to the whole network.
        store = dist.FileStore(str(meeting_place), self.size)  # type: ignore[attr-defined]
        interfaces = dict.fromkeys(INTERFACE_VARIABLES, LOOPBACK)
        if not (isinstance(job, TrainPlan) and len(job.hosts) > 1):
            os.environ.update(interfaces)  # gloo serves whoever connects, wherever it listens
        for name, value in {**interfaces, **NCCL_SETTINGS}.items():
            os.environ.setdefault(name, value)
        # Longer than the silence that counts as a stall, which names the rank that hangs.
        limit = timedelta(seconds=2 * job.stall_seconds + 60)
        # NCCL refuses two ranks on one GPU; their gradients pass through host memory then.
        if gradients and job.device == "cuda" and 1 < self.size == len(set(job.places)):
            self._device = "cuda"
        backend = "gloo" if self._device == "cpu" else "cpu:gloo,cuda:nccl"
        _together(
            lambda: dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=limit
            )
        )
        self._require_alike([code_digest(), torch.__version__, job.model_dump(mode="json")])
        if self._device == "cuda":
            # NCCL takes its memory at the first exchange: now, before the rows fill the budget.
            one = torch.ones(self.size, device="cuda")
            _together(lambda: dist.all_to_all_single(torch.empty_like(one), one))

    def leave(self) -> None:
        """Close the connections to the other ranks, after a training that reached its end."""
        dist.destroy_process_group()

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return the numbers of all ranks, in their order; each gives as many.

        They never touch the GPU, so nothing waits for its queued work.

        Raises:
            RanksPartedError: another rank has ended.
        """
        own = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        _together(lambda: dist.all_gather(found, own))
        return [tensor.tolist() for tensor in found]

    def highest(self, number: int) -> int:
        """Return the highest of a number over all ranks; below 2**53, as a float64 holds it."""
        return max(int(other) for (other,) in self.gather([number]))

    def share(self, own: Any) -> list[Any]:
        """Return the JSON values of all ranks, in their order."""
        data = json.dumps(own).encode()
        sizes = [int(size) for (size,) in self.gather([len(data)])]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.size)]
        _together(lambda: dist.all_gather(found, padded))
        texts = (each[:size].numpy().tobytes() for each, size in zip(found, sizes, strict=True))
        return [json.loads(text) for text in texts]

    def share_step(self, batches: Sequence[MicroBatch], *, wants_stop: bool) -> StepTotals:
        """Count the tokens of a step over all ranks, and hear whether one of them has to stop."""
        own = (
            sum(map(real_tokens, batches)),
            sum(map(trained_tokens, batches)),
            float(wants_stop),
        )
        real, trained, stops = map(sum, zip(*self.gather(own), strict=True))
        return StepTotals(int(real), int(trained), stops > 0)

    def sum_gradients(
        self, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor
    ) -> torch.Tensor:
        """Replace each rank's fp32 gradients by their sum over all ranks; return the sum of `loss`.

        A rank without a gradient counts as zero. Every rank sums one share of all numbers in the
        order of ranks, and sends the sums to the others: so the bits depend on the number of ranks
        alone, and a rank moves twice the gradients' bytes however many there are.

        Raises:
            RanksPartedError: another rank has ended.
        """
        if self.size == 1:  # the others were lost
            return loss
        mine, theirs, views = self._buffers_for(parameters)
        pairs = zip(views, parameters, strict=True)
        own = [(view, p.grad) for view, p in pairs if p.grad is not None]
        if parameters[0].is_cuda:
            stream = torch.cuda.current_stream()
            self._nothing_queued.append(stream.query())
            if self._device == "cpu":
                stream.synchronize()  # the copies would wait, and count as exchange
        started = self._now()
        if len(own) < len(views):
            mine.zero_()
        if own:  # at once: 500 launches of their own would take longer than the exchange
            torch._foreach_copy_([view for view, _ in own], [gradient for _, gradient in own])
        end = sum(parameter.numel() for parameter in parameters)
        mine[end] = loss
        _together(lambda: dist.all_to_all_single(theirs, mine))
        shares = theirs.view(self.size, -1)
        for share in shares[1:]:
            shares[0] += share
        shares[1:] = shares[0]
        _together(lambda: dist.all_to_all_single(mine, theirs))
        self._exchanges.append((started, self._now()))
        for parameter, view in zip(parameters, views, strict=True):
            parameter.grad = view.to(parameter.device)
        return mine[end].clone().to(loss.device)

    @property
    def exchange_ms(self) -> float:
        """Median time of the last exchanges, waiting for the slowest included; 0 without one."""
        # Not the mean: the first waits for kernels that others compile.
        return self._median_ms(list(self._exchanges))

    @property
    def computing_ms(self) -> float:
        """Median time from an exchange to the next one, of the last steps; 0 with less than two."""
        return self._median_ms([(end, start) for (_, end), (start, _) in pairwise(self._exchanges)])

    @property
    def launch_bound_share(self) -> float:
        """Share of the last steps at whose exchange the GPU had nothing left to compute.

        It had done all as soon as it was launched: a faster GPU would not be faster there.
        """
        return sum(self._nothing_queued) / max(1, len(self._nothing_queued))

    def _median_ms(self, spans: Sequence[tuple[Any, Any]]) -> float:
        """Return the median of spans between results of `_now`; 0 without one."""
        if not spans:
            return 0.0
        if self._device == "cpu":
            times: list[float] = [1000 * (end - start) for start, end in spans]
        else:
            torch.cuda.synchronize()
            times = [float(start.elapsed_time(end)) for start, end in spans]
        return statistics.median(times)

    def _now(self) -> Any:
        """Return the time in seconds, or on a GPU an event among its queued work."""
        if self._device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def merge(self, own: Sequence[tuple[float, int]], count: int) -> list[tuple[float, int]]:
        """Return all of `count` pairs, of which item i is at i // size of rank i % size."""
        rows = -(-count // self.size)
        padded = [*own, *[(0.0, 0)] * (rows - len(own))]
        found = self.gather([number for pair in padded for number in pair])
        places = (divmod(index, self.size) for index in range(count))
        return [(found[rank][2 * row], int(found[rank][2 * row + 1])) for row, rank in places]

    def _require_alike(self, computes_from: Any) -> None:
        """Refuse to work beside a rank that computes from another version of the code or plan."""
        digest = int(sha256_json(computes_from)[:12], 16)  # 48 bits, which a float64 holds
        found = [int(own) for (own,) in self.gather([digest])]
        different = [str(rank) for rank, other in enumerate(found) if other != found[0]]
        if different:
            raise EnvironmentNotReadyError(
                f"Rank {', '.join(different)} of {self.size} has another version of qwen3ft or of "
                "its plan than rank 0.",
                why="All ranks of a job must compute the same.",
                next_command="qwen3ft doctor",
                ranks=different,
            )

    def _buffers_for(
        self, parameters: Sequence[torch.nn.Parameter]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Return two buffers for all gradients and a loss, fp32, in equal shares; made once.

        The third result has a view of the first buffer for each parameter, of its shape.
        """
        if self._buffers is None:
            sizes = [parameter.numel() for parameter in parameters]
            slots = -(-(sum(sizes) + 1) // self.size) * self.size
            first = torch.zeros(slots, dtype=torch.float32, device=self._device)
            flat = torch.split(first[: sum(sizes)], sizes)
            views = [view.view_as(p) for view, p in zip(flat, parameters, strict=True)]
            self._buffers = first, torch.zeros_like(first), views
        return self._buffers


class StepTotals:
    """Counts of a step over all ranks."""

    def __init__(self, real_tokens: int, trained_tokens: int, must_stop: bool) -> None:
        self.real_tokens = real_tokens
        self.trained_tokens = trained_tokens
        self.must_stop = must_stop


def _together(collective: Callable[[], object]) -> None:
    """Run a collective; what breaks it is that another rank has ended, or this rank's own GPU."""
    try:
        collective()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:  # gloo's own, and torch's DistBackendError
        if isinstance(translate(error, ""), OutOfMemoryError):  # NCCL's own memory
            raise
        first_line: Any = str(error).partition("\n")[0]
        raise RanksPartedError(
            f"The connection to the other ranks broke: {first_line[:300]}",
            why="Another rank has ended; its failure is the cause.",
            next_command="qwen3ft status",
        ) from error
