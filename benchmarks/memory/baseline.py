"""Memory of a short training on the CPU, phase by phase, compared with a stored baseline.

    python -m benchmarks.memory.baseline [--update]

Trains the embedded model in a worker process, as a run does, and samples the memory that is the
process's alone (RssAnon; pages of shared libraries depend on the machine). Fails if the peak is
more than 5 % above `results/memory-baseline-cpu.json`, and names the phase in which it grew: the
imports, loading the model, training, evaluating, finishing. `--update` stores the new numbers.
Linux only. On a GPU use `benchmarks.memory.campaign --baseline`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.machine import ROOT, machine, write_json
from qwen3ft.units import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qwen3ft.jobs.folders import JobDir

BASELINE = ROOT / "benchmarks" / "results" / "memory-baseline-cpu.json"
GROWTH = 0.05
SAMPLE_SECONDS = 0.005
STEPS, EVALUATE_EVERY_STEPS = 12, 6
FIXED_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",  # else the number of arenas depends on timing
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment that makes two measurements comparable."""


def measure(work: Path) -> dict[str, float]:
    """Return the peak in MiB of each phase of a training.

    Args:
        work: Folder of the run.
    """
    from qwen3ft.config import TrainingConfig
    from qwen3ft.jobs.folders import RunDir
    from qwen3ft.jobs.launcher import run_worker
    from qwen3ft.operations.preview import preview_plan
    from qwen3ft.records.training import AttemptOutcome

    with _environment(FIXED_ENVIRONMENT):
        config = TrainingConfig(
            model_name="embedded",
            cache_dir=str(work / "cache"),
            max_memory_gb=4.0,
            batch_size=16,
            gradient_accumulation_steps=1,
            max_sequence_length=128,
            max_rows=192,
            num_epochs=1,
            max_steps=STEPS,
            evaluate_every_steps=EVALUATE_EVERY_STEPS,
        )
        plan = preview_plan(config)  # its workers also compile the bytecode of every import
        run = RunDir(work / "run")
        plan = plan.for_run("baseline", str(run.path), attempt=1, resume_from=None)
        job = run.attempt(1).create(plan)
        sampler = _Sampler(job)
        sampler.start()
        run_worker("train", job, AttemptOutcome, stall_seconds=120.0)
        sampler.join()
    return {phase: peak / MIB for phase, peak in sampler.peak_bytes.items()}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class _Sampler(threading.Thread):
    """Samples the worker's memory and its current phase until it ends."""

    def __init__(self, job: JobDir) -> None:
        super().__init__(daemon=True)
        self.job = job
        self.peak_bytes: dict[str, int] = {}

    def run(self) -> None:
        """Sample from the worker's start to its end."""
        worker = None
        waited = threading.Event()
        while worker is None:
            waited.wait(SAMPLE_SECONDS)
            worker = self._find()
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            while worker.status() != psutil.STATUS_ZOMBIE:
                status = Path(f"/proc/{worker.pid}/status").read_text(encoding="utf-8")
                line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
                size, phase = int(line.split()[1]) * 1024, self._phase()
                self.peak_bytes[phase] = max(size, self.peak_bytes.get(phase, 0))
                waited.wait(SAMPLE_SECONDS)

    def _find(self) -> psutil.Process | None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if str(self.job.path) in process.cmdline():
                    return process
        return None

    def _phase(self) -> str:
        try:
            beat: dict[str, Any] = json.loads(self.job.heartbeat.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "imports"
        return str(beat["phase"])


def grown(now: dict[str, float], before: dict[str, float]) -> str | None:
    """Name the phase that grew if the peak is more than 5 % above `before`; else return None."""
    peak, old = max(now.values()), max(before.values())
    if peak <= (1 + GROWTH) * old:
        return None
    growth = {phase: size - before.get(phase, 0.0) for phase, size in now.items()}
    # Later phases hold the memory of earlier ones, so the first that grew is the cause.
    first = next(phase for phase in now if growth[phase] > GROWTH / 2 * old)
    return (
        f"the peak is {peak:.1f} MiB, {peak / old - 1:.1%} above the baseline of {old:.1f}; it "
        f"grew in the phase '{first}': {now[first]:.1f} MiB, before {before.get(first, 0.0):.1f}"
    )


def main() -> int:
    """Measure, print and compare; return 1 if memory grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--update", action="store_true", help="store the measurement as the baseline"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        now = measure(Path(work))
    print(f"{machine()['date']}  embedded model, CPU")
    before = json.loads(BASELINE.read_text(encoding="utf-8"))["mib"] if BASELINE.exists() else {}
    for phase, size in now.items():
        print(f"{phase:<10} {size:7.1f} MiB   baseline {before.get(phase, 0.0):7.1f}")
    if arguments.update:
        write_json(BASELINE, {"machine": machine(), "mib": now})
        return 0
    if not before:
        print(f"{BASELINE} does not exist: run again with --update")
        return 2
    problem = grown(now, before)
    print(problem or "no more than 5 % above the baseline")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
