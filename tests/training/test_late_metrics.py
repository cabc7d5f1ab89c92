"""Metrics of a step are read when later steps are already queued."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen3ft.training.late_metrics import DelayedMetrics, StepNumbers


def put(numbers: DelayedMetrics, step: int, device: str = "cpu") -> StepNumbers:
    """Put distinct numbers in, and return them."""
    loss = torch.tensor(step + 0.5, device=device, requires_grad=True)
    numbers.put(step, step / 10, step / 100, loss, torch.tensor(step + 0.25, device=device))
    return StepNumbers(step, step / 10, step / 100, step + 0.5, step + 0.25)


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_all_but_the_newest_are_taken_in_order(lag: int) -> None:
    """Each once; the newest `lag` stay in the queue until there are newer ones."""
    numbers, taken, wanted = DelayedMetrics(lag), [], []
    assert list(numbers.take()) == []
    for step in range(1, 8):
        wanted.append(put(numbers, step))
        taken += numbers.take()
        assert taken == wanted[: max(0, step - lag)]
        assert list(numbers.take()) == []
    taken += numbers.take(everything=True)
    assert taken == wanted
    assert list(numbers.take(everything=True)) == []


def test_everything_takes_what_has_piled_up() -> None:
    """The lag applies again afterwards."""
    numbers = DelayedMetrics(1)
    wanted = [put(numbers, step) for step in (1, 2, 3)]
    assert list(numbers.take(everything=True)) == wanted
    fourth = put(numbers, 4)
    assert list(numbers.take()) == []
    put(numbers, 5)
    assert list(numbers.take()) == [fourth]


def test_numbers_are_those_of_their_own_step() -> None:
    """Though the trainer zeroes its sum in place, and the norm may be of another type."""
    numbers = DelayedMetrics(1)
    loss, norm = torch.tensor(2.5), torch.tensor(1.5, dtype=torch.bfloat16)
    numbers.put(1, 0.1, 1e-3, loss, norm)
    loss.zero_()
    norm.zero_()
    [taken] = numbers.take(everything=True)
    assert (taken.loss, taken.grad_norm) == (2.5, 1.5)
    assert all(type(value) is float for value in (taken.loss, taken.grad_norm))


@pytest.mark.gpu
def test_on_a_gpu_numbers_arrive_without_being_waited_for() -> None:
    """`put` returns while the device is still busy; the numbers taken are right."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    numbers = DelayedMetrics(1)
    put(numbers, 1, "cuda")
    list(numbers.take(everything=True))  # CUDA is set up by now
    loss, norm = torch.tensor([2.5, 2.25], device="cuda").unbind()  # made before it is busy
    big = torch.ones(8192, 8192, device="cuda", dtype=torch.bfloat16)
    busy: Any = big @ big
    for _ in range(50):
        busy = big @ busy * 1e-4
    numbers.put(2, 0.2, 0.02, loss, norm)
    wanted = StepNumbers(2, 0.2, 0.02, 2.5, 2.25)
    assert not torch.cuda.current_stream().query()
    assert list(numbers.take()) == []
    assert not torch.cuda.current_stream().query()
    assert list(numbers.take(everything=True)) == [wanted]
