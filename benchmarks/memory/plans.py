"""Checks that recovery from running out of memory does not change the result of a training.

    python -m benchmarks.memory.plans --work DIR --out results.json [--sequences 16] [--seed 0]

Runs the embedded model on the CPU in fp32 through the product's own trainer and worker:

- gradients of one effective batch of `--sequences`, for every micro-batch size that divides it,
  padded and packed, recomputed or not, with small and large loss chunks, plain and fused, compared
  with the whole batch at once on the same path; plain ones also in float64, without rounding;
- a shrink: a run whose k-th step runs out of memory, adjusted by `qwen3ft.recovery.adjust`, must
  end with the same adapter, bit by bit, as an undisturbed run of the final plan from the same
  checkpoint;
- giving up: if every attempt runs out of memory, at most five are made, and the error lists them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, write_json

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}

import torch

from benchmarks.memory.gradients import make_plan, measure_gradients, train
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import sha256_file
from qwen3ft.errors import FinetuneError
from qwen3ft.faults import VARIABLE as FAULTS
from qwen3ft.jobs.failures import translate
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import Failure
from qwen3ft.recovery.adjust import FailedAttempt, GiveUp, decide_retry

EXACT_TOLERANCE = 1e-12
"""Largest relative difference of gradients in float64."""

TOLERANCE = 1e-6
"""The same in fp32, compared with the whole batch at once on the same path."""

MOST_ATTEMPTS = 5
STEPS, CHECKPOINT_EVERY_STEPS = 8, 2
FAILING_STEPS = (1, 3, 6, 8)


def recover(plan: TrainPlan, faults: str) -> tuple[TrainPlan | GiveUp, list[FailedAttempt]]:
    """Recover as the flow does; return the completed plan or the giving up, and what failed."""
    os.environ[FAULTS] = faults
    failed: list[FailedAttempt] = []
    try:
        while True:
            try:
                train(plan)
            except (FinetuneError, RuntimeError) as error:
                failure = Failure.from_error(translate(error, "train"))
            else:
                return plan, failed
            failed.append(FailedAttempt(plan, failure))
            saved = sorted(Path(plan.run_dir).glob("attempts/*/checkpoints/step-*"))
            decision = decide_retry(
                failed,
                max_attempts=MOST_ATTEMPTS,
                allow_degraded=False,
                newest_checkpoint=str(saved[-1]) if saved else None,
            )
            if isinstance(decision, GiveUp):
                return decision, failed
            plan = decision.plan
    finally:
        del os.environ[FAULTS]


def last_adapter(run_dir: str) -> str:
    """Return the sha256 of the last checkpoint's adapter."""
    path = max(Path(run_dir).glob("attempts/*/checkpoints/step-*"), key=lambda each: each.name)
    return sha256_file(path / "adapter_model.safetensors")


def measure_shrinks(config: TrainingConfig, work: Path) -> list[dict[str, Any]]:
    """For each failing step, compare the adapter with that of an undisturbed run."""
    rows = []
    schedule = {
        "total_steps": STEPS,
        "evaluate_every_steps": CHECKPOINT_EVERY_STEPS,
        "keep_checkpoints": STEPS,
        "early_stopping_patience": STEPS,
    }
    for step in FAILING_STEPS:
        plan = make_plan(config, work / f"shrunk-{step}", **schedule)
        final, failed = recover(plan, f"oom@step={step}")
        if isinstance(final, GiveUp):
            raise TypeError(f"recovery gave up: {final.reason}")
        plans = [*(each.plan for each in failed), final]
        again = work / f"again-{step}"
        train(final.model_copy(update={"run_dir": str(again), "attempt": 1}))
        rows.append(
            {
                "step": step,
                "attempts": [*(each.failure.kind for each in failed), "completed"],
                "resumed_from": final.resume_from and Path(final.resume_from).name,
                "micro_batches": [each.memory.micro_batch_size for each in plans],
                "effective_batch_sizes": sorted({each.effective_batch_size for each in plans}),
                "same_adapter": last_adapter(final.run_dir) == last_adapter(str(again)),
            }
        )
    return rows


def measure_end(config: TrainingConfig, work: Path) -> dict[str, Any]:
    """Return how a run ends if every attempt runs out of memory."""
    plan = make_plan(config, work / "never", total_steps=STEPS)
    every = ",".join(f"oom@step=1:attempt={number}" for number in range(1, 20))
    end, attempts = recover(plan, every)
    if not isinstance(end, GiveUp):
        raise TypeError("the run completed")
    return {
        "attempts": len(attempts),
        "kind": end.failure.kind,
        "message": end.failure.what,
        "next": end.failure.next_command,
    }


def main() -> int:
    """Measure all three, print a table, write the JSON; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, help="folder of runs and caches; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=16, help="size of the effective batch")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        config = TrainingConfig(
            model_name="embedded",
            cache_dir=str(work / "cache"),
            max_memory_gb=4.0,
            batch_size=arguments.sequences,
            gradient_accumulation_steps=1,
            max_sequence_length=128,
            max_rows=16 * arguments.sequences,
            learning_rate=4e-3,
            num_epochs=1,
            seed=arguments.seed,
        )
        results: dict[str, Any] = {"machine": machine(), "sequences": arguments.sequences}
        # With more threads, the order of fp32 sums depends on how they share a product of few rows.
        torch.set_num_threads(1)
        results["gradients"] = measure_gradients(config, work)
        results["shrinks"] = measure_shrinks(config, work)
        results["end"] = measure_end(config, work)
    whole, *rows = results["gradients"]
    largest = {
        name: max((row for row in rows if name in row), key=lambda row: row[name])
        for name in ("exact_from_exact", "from_exact", "from_whole")
    }
    exact = sum("exact_from_exact" in row for row in rows)
    results["verdicts"] = {
        f"gradients of {exact} plans in float64 within {EXACT_TOLERANCE:g}": (
            largest["exact_from_exact"]["exact_from_exact"] <= EXACT_TOLERANCE
        ),
        f"gradients of {len(rows)} plans in fp32 within {TOLERANCE:g}": (
            largest["from_whole"]["from_whole"] <= TOLERANCE
        ),
        "adapters after a shrink are those of undisturbed runs": all(
            row["same_adapter"] and len(row["effective_batch_sizes"]) == 1
            for row in results["shrinks"]
        ),
        f"at most {MOST_ATTEMPTS} attempts, then InsufficientMemoryError": (
            results["end"]["attempts"] <= MOST_ATTEMPTS
            and results["end"]["kind"] == "InsufficientMemoryError"
        ),
    }
    write_json(arguments.out, results)
    print(f"\n{results['machine']['date']}  torch {torch.__version__}, CPU, fp32\n")
    print("largest relative difference of a gradient:")
    for name, words in (
        ("exact_from_exact", "in float64, from the whole batch at once"),
        ("from_exact", f"in fp32, from float64 (whole batch: {whole['from_exact']:.2e})"),
        ("from_whole", "in fp32, from the whole batch at once, on the same path"),
    ):
        row = largest[name]
        settings = ", ".join(str(row[key]) for key in ("kernels", "micro_batch_size", "packing"))
        print(f"  {row[name]:.2e} {words}; {settings}")
    for row in results["shrinks"]:
        print(
            f"out of memory at step {row['step']}: micro-batches {row['micro_batches']}, resumed "
            f"from {row['resumed_from']}, same adapter: {row['same_adapter']}"
        )
    print(f"always out of memory: {results['end']['attempts']} attempts, {results['end']['kind']}:")
    print("  " + results["end"]["message"].replace("\n", "\n  "))
    print()
    for name, holds in results["verdicts"].items():
        print(f"{name}: {'yes' if holds else 'no'}")
    return 0 if all(results["verdicts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
