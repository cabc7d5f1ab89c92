"""Gradients of one effective batch under every way to split it, in fp32 and in float64.

Runs the embedded model on the CPU through the product's own trainer and worker. The benchmark is
`plans.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.preview import preview_plan
from qwen3ft.planning.packing import divisors
from qwen3ft.records.plan import TrainPlan
from qwen3ft.training.engine import TrainingEngine
from qwen3ft.worker import jobs as worker

B_STD = 0.02


class _StepMeasuredError(Exception):
    """Ends a training after its first gradient, the only one needed."""


def make_plan(config: TrainingConfig, run: Path, **changes: Any) -> TrainPlan:
    """Return the plan of `config` as attempt 1 of a run in the folder `run`."""
    plan = preview_plan(config)
    plan = plan.for_run(run.name, str(run), attempt=1, resume_from=None)
    return plan.with_settings(**changes)


def train(plan: TrainPlan) -> Any:
    """Run one attempt in this process."""
    return worker.train_job(
        worker.Job(RunDir(Path(plan.run_dir)).attempt(plan.attempt).create(plan).path)
    )


def splits(effective: int) -> Iterator[dict[str, Any]]:
    """Yield every way to split an effective batch, as changes of a plan."""
    for micro, packing, recompute, chunk in itertools.product(
        divisors(effective), (False, True), (False, True), (32, 4096)
    ):
        yield {
            "kernels": "plain",
            "micro_batch_size": micro,
            "packing": packing,
            "gradient_checkpointing": recompute,
            "loss_chunk_tokens": chunk,
        }
    for micro, room, chunk, groups, offload in itertools.product(
        divisors(effective), (0, 10**12), (64, 10**6), (1, 2), (False, True)
    ):
        yield {
            "kernels": "fused",
            "micro_batch_size": micro,
            "packing": True,
            "gradient_checkpointing": room == 0,
            "activation_bytes": room,
            "loss_chunk_tokens": chunk,
            "chunk_tokens": chunk,
            "head_groups": groups,
            "offload_activations": offload,
        }


def first_gradient(plan: TrainPlan, *, exact: bool = False) -> dict[str, torch.Tensor]:
    """Return the gradient of the first effective batch by the worker's code; exact: in float64."""
    found: dict[str, torch.Tensor] = {}

    def measure(_: TrainingEngine, trainer: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:  # B = 0 at the start would make all gradients of A zero
                    parameter.normal_(std=B_STD, generator=generator)
        steps = iter(trainer.get_train_dataloader())
        (step,), trained = trainer.get_batch_samples(steps, 1, trainer.args.device)
        with in_float64(trainer.model) if exact else nullcontext():
            trainer.training_step(trainer.model, step, trained)
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                found[name] = parameter.grad.double()
        raise _StepMeasuredError

    engine: Any = TrainingEngine
    before, engine.train_model = engine.train_model, measure
    try:
        train(plan)
    except _StepMeasuredError:
        return found
    finally:
        engine.train_model = before
    raise AssertionError("the training was not reached")


def measure_gradients(config: TrainingConfig, work: Path) -> list[dict[str, Any]]:
    """Compare the gradient of every split with that of the whole batch at once.

    Differences are relative to the norm: `from_whole` in fp32, from the whole batch on the same
    path; `from_exact` in fp32, from the plain path in float64; `exact_from_exact` with both in
    float64, for plain splits. The first row is the whole batch itself.
    """
    effective = config.effective_batch_size
    whole = {"micro_batch_size": effective, "packing": False}
    plan = make_plan(config, work / "whole", kernels="plain", **whole)
    reference = {"plain": first_gradient(plan)}
    exact = first_gradient(plan.model_copy(update={"attempt": 2}), exact=True)
    rows = [
        {"kernels": "plain"}
        | whole
        | {"from_exact": _relative_difference(reference["plain"], exact)}
    ]
    for number, changes in enumerate(splits(effective)):
        plan = make_plan(config, work / f"split-{number}", **changes)
        gradient = first_gradient(plan)
        # The first of `splits` on each path is the whole batch.
        whole_of_path = reference.setdefault(plan.memory.kernels, gradient)
        row = {
            "from_whole": _relative_difference(gradient, whole_of_path),
            "from_exact": _relative_difference(gradient, exact),
        }
        if plan.memory.kernels == "plain":
            again = first_gradient(plan.model_copy(update={"attempt": 2}), exact=True)
            row["exact_from_exact"] = _relative_difference(again, exact)
        rows.append(changes | row)
    return rows


def _relative_difference(
    gradient: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> float:
    """Return the norm of the difference divided by the norm of `reference`."""
    return _norm({name: gradient[name] - reference[name] for name in reference}) / _norm(reference)


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(tensor.norm()) ** 2 for tensor in tensors.values()) ** 0.5


@contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """Make `model` compute in float64, on the CPU and the plain path; it stays that way.

    Frozen 4-bit weights are dequantised once. Casts to fp32 in transformers and in the product
    (norms, the loss) are skipped inside the context.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            weight = dequantize_4bit(module.weight.data, state).reshape(state.shape).double()
            module.forward = _product(weight)
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.double()
    to_float, to = torch.Tensor.float, torch.Tensor.to

    def keep_or_float(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float64 else to_float(tensor, *arguments, **options)

    def keep_or_to(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if tensor.dtype == torch.float64 and arguments[:1] == (torch.float32,):
            return tensor
        result: torch.Tensor = to(tensor, *arguments, **options)
        return result

    torch.Tensor.float, torch.Tensor.to = keep_or_float, keep_or_to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = to_float, to  # type: ignore[method-assign]


def _product(weight: torch.Tensor) -> Any:
    return lambda x: torch.nn.functional.linear(x, weight)
