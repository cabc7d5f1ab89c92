"""Trainings of the embedded model that are interrupted, resumed as the flow does, and compared.

Workers are forked from a warm process (nursery.py), so that an attempt costs a second or two.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from benchmarks.machine import ROOT
from qwen3ft.config import TrainingConfig
from qwen3ft.disk.files import sha256_file
from qwen3ft.embedded import DATA_DIR
from qwen3ft.faults import VARIABLE
from qwen3ft.jobs.failures import translate_exit
from qwen3ft.jobs.folders import RunDir, read_record
from qwen3ft.operations.preview import preview_plan
from qwen3ft.records.plan import TrainPlan
from qwen3ft.records.training import AttemptOutcome, Failure
from qwen3ft.report.attempts import read_run_metrics
from qwen3ft.training import checkpoint

ROWS = {"train": 48, "dev": 12, "test": 4}
"""Rows of each split: an epoch is 3 steps of 16."""

FUSED = {
    "kernels": "fused",
    "packing": True,
    "chunk_tokens": 64,
    "activation_bytes": 2_000_000,
    "loss_chunk_tokens": 64,
}
PATHS: dict[str, dict[str, Any]] = {
    "padded, dropout": {"lora_dropout": 0.1},
    "packed, dropout": {"lora_dropout": 0.1, "packing": True},
    "fused": FUSED,
    "fused, offloaded": {**FUSED, "offload_optimizer": True, "offload_activations": True},
    "stopped early": {"packing": True, "learning_rate": 0.03, "early_stopping_patience": 1},
}
"""Settings of the plans; the fused path runs as its plain twin on a CPU."""

SCHEDULE = {"total_steps": 10, "evaluate_every_steps": 3, "micro_batch_size": 4}
"""The last step is neither the end of an epoch nor a multiple of an evaluation's."""

FIRST_START_SECONDS = 900.0
IDENTICAL = ("best_step", "best_held_out_loss", "first_held_out_loss", "last_step", "epochs")
IDENTICAL_TOO = ("final_loss", "stopped_early")


class Starter(Protocol):
    """Starts one worker at a time; `Nursery` is one."""

    def start(self, job: Path, faults: str = "", power: Path | None = None) -> int:
        """Start the worker of the job and return its process id."""

    def wait(self, seconds: float) -> int | None:
        """Return the worker's exit status; None if it has not ended within `seconds`."""


class Nursery:
    """The process that forks workers, one at a time; a context manager."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kills.nursery"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", VARIABLE: ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._read(FIRST_START_SECONDS) != "ready":
            sys.exit("the process that forks workers did not start")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def start(self, job: Path, faults: str = "", power: Path | None = None) -> int:
        """Start the worker of the job and return its process id.

        Args:
            job: Folder of the attempt.
            faults: Value of `QWEN3FT_FAULTS`.
            power: Empty folder in which to record what it makes durable; None: do not.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        request = {
            "job": str(job),
            "environment": {VARIABLE: faults},
            "power": None if power is None else str(power),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._read(FIRST_START_SECONDS))

    def wait(self, seconds: float) -> int | None:
        """Return the worker's exit status; None if it has not ended within `seconds`."""
        found = self._read(max(0.0, seconds))
        return int(found) if found else None

    def _read(self, seconds: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return ""
        return self._process.stdout.readline().strip()


def make_plan(work: Path, path: str) -> TrainPlan:
    """Return the plan of a training with the settings of `PATHS[path]`; its run is not set."""
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split, rows in ROWS.items():
        lines = (DATA_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"{split}.jsonl").write_text("".join(lines[:rows]), encoding="utf-8")
    changes = dict(PATHS[path])
    config = TrainingConfig(
        model_name="embedded",
        cache_dir=str(work / "cache"),
        runs_dir=str(work / "runs"),
        data_paths=(str(data / "train.jsonl"),),
        dev_paths=(str(data / "dev.jsonl"),),
        test_paths=(str(data / "test.jsonl"),),
        batch_size=16,
        gradient_accumulation_steps=1,
        learning_rate=4e-3,
        lora_r=8,
        lora_alpha=16,
        lora_dropout=changes.pop("lora_dropout", 0.0),
        max_sequence_length=128,
        max_memory_gb=4.0,
        keep_checkpoints=2,
    )
    return preview_plan(config).with_settings(**{**SCHEDULE, **changes})


def next_attempt(plan: TrainPlan, run: RunDir) -> TrainPlan:
    """Return the plan of the run's next attempt, from the newest checkpoint, as the flow does."""
    folders = [job.checkpoints for job in run.attempts()]
    newest = checkpoint.newest_verified(folders, checkpoint.lineage(plan))
    resume_from = str(newest.path) if newest else None
    return plan.for_run(
        run.path.name, str(run.path), attempt=run.next_attempt(), resume_from=resume_from
    )


def newest_step(run: RunDir) -> int:
    """Return the step of the newest checkpoint that verifies; 0 without one."""
    newest = checkpoint.newest_verified([job.checkpoints for job in run.attempts()])
    return newest.step if newest else 0


def read_failure(run: RunDir, number: int, status: int) -> Failure:
    """Return why an attempt ended, as the flow's process would classify it."""
    job = run.attempt(number)
    log = job.log.read_text(encoding="utf-8", errors="replace") if job.log.exists() else ""
    tail = "\n".join(log.splitlines()[-30:])
    return job.read_failure() or Failure.from_error(translate_exit(status, tail))


@dataclass(frozen=True)
class Result:
    """Everything in which a resumed run must equal an undisturbed one."""

    adapter: str
    """sha256 of the best checkpoint's adapter."""
    state: str
    """sha256 of optimizer, scheduler and generators after the last step."""
    outcome: Mapping[str, Any]
    losses: tuple[tuple[int, float | None, float | None, float, float | None], ...]
    """(step, loss, held-out loss, learning rate, gradient norm) of each line of all attempts."""

    def differences(self, other: Result) -> list[str]:
        """Name what differs, with both values."""
        found = [
            f"{name}: {mine} instead of {theirs}"
            for name, mine, theirs in (
                ("adapter", self.adapter[:12], other.adapter[:12]),
                ("state", self.state[:12], other.state[:12]),
                *((name, value, other.outcome[name]) for name, value in self.outcome.items()),
            )
            if mine != theirs
        ]
        if self.losses != other.losses:
            mine = [line for line in self.losses if line not in other.losses]
            gone = [line for line in other.losses if line not in self.losses]
            count = f"{len(self.losses)} lines instead of {len(other.losses)}"
            found.append(f"metrics: {count}; new {mine[:3]}; gone {gone[:3]}")
        return found


def read_result(run: RunDir) -> Result:
    """Read the result of a run whose last attempt has an outcome."""
    *_, job = run.attempts()
    outcome = read_record(job.outcome, AttemptOutcome)
    folders = [each.checkpoints for each in run.attempts()]
    last = checkpoint.newest_verified(folders)
    assert last is not None
    names = (*IDENTICAL, *IDENTICAL_TOO)
    lines = [line for kept in read_run_metrics(run).values() for line in kept]
    return Result(
        adapter=sha256_file(Path(outcome.best_checkpoint) / "adapter_model.safetensors"),
        state=sha256_file(last.path / "training_state.safetensors")
        + sha256_file(last.path / "training_state.json"),
        outcome={name: getattr(outcome, name) for name in names},
        losses=tuple(
            (line.step, line.loss, line.held_out_loss, line.learning_rate, line.grad_norm)
            for line in lines
        ),
    )


def train_undisturbed(nursery: Starter, plan: TrainPlan, run: RunDir) -> tuple[Result, float]:
    """Train to the end; return the result and the seconds it took."""
    job = run.attempt(1).create(next_attempt(plan, run))
    started = time.monotonic()
    nursery.start(job.path)
    status = nursery.wait(FIRST_START_SECONDS)
    if status != 0:
        raise RuntimeError(f"an undisturbed training ended with {status}; see {job.log}")
    return read_result(run), time.monotonic() - started
