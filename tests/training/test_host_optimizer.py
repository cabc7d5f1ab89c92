"""AdamW on the host is AdamW: the same numbers, the same state, nothing on the GPU."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3ft.training.checkpoint_writer import (
    load_optimizer_state,
    read_training_state,
    write_training_state,
)
from qwen3ft.training.host_optimizer import HostAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def parameters(device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 40), (40, 6), (7,)]
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes
    ]


def give_gradients(values: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for value in values:
        value.grad = torch.randn(value.shape, generator=generator).to(value.device)


def test_every_step_is_that_of_torch_bit_for_bit() -> None:
    ours, theirs = parameters(), parameters()
    host = HostAdamW(ours, **SETTINGS)
    fused = torch.optim.AdamW(theirs, fused=True, **SETTINGS)
    for step in range(5):
        for values, optimizer in ((ours, host), (theirs, fused)):
            give_gradients(values, step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)  # as a scheduler does
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], parameters()[0])


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    values = parameters()
    host = HostAdamW(values, **SETTINGS)
    give_gradients(values, 0)
    values[1].grad = None
    before = values[1].detach().clone()
    host.step()
    assert torch.equal(values[1], before)
    assert values[1] not in host.state


def test_a_step_that_found_infinities_changes_nothing() -> None:
    values = parameters()
    host = HostAdamW(values, **SETTINGS)
    give_gradients(values, 0)
    host.found_inf = torch.ones(1)
    host.step()
    assert all(torch.equal(a, b) for a, b in zip(values, parameters(), strict=True))
    host.found_inf = torch.zeros(1)
    host.step()
    assert not torch.equal(values[0], parameters()[0])


def test_a_resumed_one_goes_on_where_it_was(tmp_path: Path) -> None:
    """Through a checkpoint, and into either kind of AdamW: the state is the same."""
    values = parameters()
    host = HostAdamW(values, **SETTINGS)
    scheduler = torch.optim.lr_scheduler.ConstantLR(host, factor=1.0)
    for step in range(3):
        give_gradients(values, step)
        host.step()
    write_training_state(tmp_path, read_training_state(host, scheduler))
    for kind in (HostAdamW, torch.optim.AdamW):
        again = [torch.nn.Parameter(value.detach().clone()) for value in values]
        optimizer = kind(again, **SETTINGS)
        resumed = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        load_optimizer_state(tmp_path, optimizer, resumed, SETTINGS["lr"])
        reference = [torch.nn.Parameter(value.detach().clone()) for value in values]
        straight = HostAdamW(reference, **SETTINGS)
        straight.load_state_dict(deepcopy(host.state_dict()))
        for part in (again, reference):
            give_gradients(part, 3)
        optimizer.step()
        straight.step()
        for mine, wanted in zip(again, reference, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", [0.5, 0.1, 2.0])
def test_the_rate_that_a_resumed_attempt_logs_first_is_its_own(
    tmp_path: Path, factor: float
) -> None:
    """After a divergence the plan's rate is another one than the checkpoint's."""
    values = parameters()
    host = HostAdamW(values, **SETTINGS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(host, lambda step: 1 / (1 + step))
    give_gradients(values, 0)
    host.step()
    scheduler.step()
    write_training_state(tmp_path, read_training_state(host, scheduler))
    again = torch.optim.AdamW(parameters(), **SETTINGS)
    resumed = torch.optim.lr_scheduler.LambdaLR(again, lambda step: 1 / (1 + step))
    load_optimizer_state(tmp_path, again, resumed, factor * SETTINGS["lr"])
    assert resumed.get_last_lr() == pytest.approx([factor * SETTINGS["lr"] / 2])
    assert again.param_groups[0]["lr"] == pytest.approx(factor * SETTINGS["lr"] / 2)


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="closure"):
        HostAdamW(parameters(), **SETTINGS).step(lambda: 0.0)


def test_a_training_with_it_ends_like_one_without(tmp_path: Path, make_plan: Any) -> None:
    """Through the worker's own code, over a checkpoint and an evaluation."""
    from safetensors.torch import load_file

    from qwen3ft.jobs.folders import RunDir
    from qwen3ft.worker import jobs as worker

    adapters = []
    for offload in (False, True):
        schedule = {"total_steps": 2, "evaluate_every_steps": 1, "offload_optimizer": offload}
        plan = make_plan(f"offload-{offload}", **schedule)
        attempt = RunDir(Path(plan.run_dir)).attempt(1).create(plan)
        worker.train_job(worker.Job(attempt.path))
        saved = attempt.checkpoints / "step-000002"
        adapters.append(load_file(saved / "adapter_model.safetensors"))
    for name, wanted in adapters[0].items():
        # Adam's first steps magnify the rounding of gradients near zero.
        torch.testing.assert_close(adapters[1][name], wanted, rtol=1e-4, atol=5e-5)
    assert max(float(wanted.abs().max()) for wanted in adapters[0].values()) > 1e-3


@pytest.mark.gpu
def test_on_a_gpu_it_holds_nothing_between_steps() -> None:
    """Its numbers equal those of the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values, twins = parameters("cuda"), parameters()
    optimizers = [HostAdamW(values, **SETTINGS), HostAdamW(twins, **SETTINGS)]
    give_gradients(values, 0)
    give_gradients(twins, 0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for optimizer in optimizers:
        optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert all(torch.equal(a.cpu(), b) for a, b in zip(values, twins, strict=True))
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    for state in optimizers[0].state.values():
        assert {tensor.device.type for tensor in state.values()} == {"cpu"}
