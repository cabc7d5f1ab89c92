"""Gradients of one effective batch on every way through it, in fp32 and in float64.

On the embedded model, on the CPU, through the product's own trainer and worker; see
`memory_plans.py`, which is the benchmark.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.float64 import in_float64
from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.preview import preview_plan
from qwen3ft.planning.packing import divisors
from qwen3ft.records.plan import TrainPlan
from qwen3ft.training.engine import TrainingEngine
from qwen3ft.worker import jobs as worker

B_STD = 0.02


class _StepMeasuredError(Exception):
    """Ends a training after the first gradient, which is all that is wanted of it."""


def make_plan(config: TrainingConfig, run: Path, **changes: Any) -> TrainPlan:
    """The plan of `config` as attempt 1 of a run in the folder `run`."""
    plan = preview_plan(config)
    return plan.for_run(run.name, str(run), attempt=1, resume_from=None).model_copy(update=changes)


def train(plan: TrainPlan) -> Any:
    """One attempt, in this process."""
    return worker.train(
        worker.Job(RunDir(Path(plan.run_dir)).attempt(plan.attempt).create(plan).path)
    )


def splits(effective: int) -> Iterator[dict[str, Any]]:
    """Every way through an effective batch, as changes of a plan."""
    for micro, packing, recompute, chunk in itertools.product(
        divisors(effective), (False, True), (False, True), (32, 4096)
    ):
        yield {
            "kernels": "plain",
            "micro_batch_size": micro,
            "gradient_accumulation_steps": effective // micro,
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
            "gradient_accumulation_steps": effective // micro,
            "packing": True,
            "gradient_checkpointing": room == 0,
            "activation_bytes": room,
            "loss_chunk_tokens": chunk,
            "chunk_tokens": chunk,
            "head_groups": groups,
            "offload_activations": offload,
        }


def first_gradient(plan: TrainPlan, *, exact: bool = False) -> dict[str, torch.Tensor]:
    """The gradient of the first effective batch, by the worker's own code; exact: in float64."""
    found: dict[str, torch.Tensor] = {}

    def measure(_: TrainingEngine, trainer: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:  # zero at the start, which would hide what flows through A
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
    """Of every split, how far its gradient is from that of the whole batch at once.

    As shares of its norm: `from_whole` in fp32, from the whole batch's on the same path;
    `from_exact` in fp32, from that of the plain path in float64; and `exact_from_exact` with both
    in float64, of plain splits. The first row is the whole batch itself.
    """
    effective = config.effective_batch_size
    whole = {"micro_batch_size": effective, "gradient_accumulation_steps": 1, "packing": False}
    plan = make_plan(config, work / "whole", kernels="plain", **whole)
    reference = {"plain": first_gradient(plan)}
    exact = first_gradient(plan.model_copy(update={"attempt": 2}), exact=True)
    rows = [{"kernels": "plain"} | whole | {"from_exact": _apart(reference["plain"], exact)}]
    for number, changes in enumerate(splits(effective)):
        plan = make_plan(config, work / f"split-{number}", **changes)
        gradient = first_gradient(plan)
        # The first of `splits` on each path is the whole batch.
        whole_of_path = reference.setdefault(plan.kernels, gradient)
        row = {"from_whole": _apart(gradient, whole_of_path), "from_exact": _apart(gradient, exact)}
        if plan.kernels == "plain":
            again = first_gradient(plan.model_copy(update={"attempt": 2}), exact=True)
            row["exact_from_exact"] = _apart(again, exact)
        rows.append(changes | row)
    return rows


def _apart(gradient: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of `reference`."""
    return _norm({name: gradient[name] - reference[name] for name in reference}) / _norm(reference)


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(tensor.norm()) ** 2 for tensor in tensors.values()) ** 0.5
