"""The sum of an adapter's gradients and nothing else, over NCCL's settings."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.scaling.training import plan_for
from qwen3ft.jobs.folders import read_record, write_record
from qwen3ft.machine.gpu_choice import VISIBLE
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.records.plan import TrainPlan
from qwen3ft.units import MIB

EXCHANGES, FIRST_EXCHANGES = 40, 5
TRIAL_SECONDS = 60.0
NCCL_TRIALS: tuple[dict[str, str], ...] = (
    {},
    {"NCCL_MAX_P2P_NCHANNELS": "1"},
    {"NCCL_MAX_P2P_NCHANNELS": "2", "NCCL_BUFFSIZE": "1048576"},
    {"NCCL_MAX_P2P_NCHANNELS": "16"},
    {"NCCL_CUMEM_ENABLE": "0"},
)
"""Settings of NCCL beside the product's own, which are the first; only the exchange alone is tried
under the others."""

TENSORS = 500
"""Tensors of an adapter, about: 7 projections of 36 blocks, two each."""


def exchange(values: dict[str, Any]) -> dict[str, Any]:
    """Sum gradients of the adapter's size and nothing else: its time, and NCCL's memory.

    Under the product's settings of NCCL first, then under others.
    """
    folder = Path(values["folder"])
    plan = plan_for(values)
    write_record(folder / "plan.json", plan)
    rows = []
    for settings in NCCL_TRIALS if plan.device == "cuda" else NCCL_TRIALS[:1]:
        row: dict[str, Any] = {"settings": settings}
        try:
            row |= exchange_under(folder, plan.ranks, settings)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if not rows:
                raise
            row["failed"] = str(error)[:200]
        rows.append(row)
        print(row, flush=True)
    return {
        **rows[0],
        "gradient_bytes": 4 * plan.adapter.trainable_parameters,
        "trials": rows,
    }


def exchange_under(folder: Path, ranks: int, settings: dict[str, str]) -> dict[str, Any]:
    """Sum gradients in processes of their own, under these settings of NCCL."""
    gpus = [gpu.uuid for gpu in visible_gpus()] or [""] * ranks
    command = [sys.executable, "-m", "benchmarks.scaling.parts", str(folder / "job.json")]
    (folder / "meeting-place").unlink(missing_ok=True)
    log = folder / f"nccl-{'-'.join(settings.values()) or 'ours'}"
    debug = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{log}.%p"}
    processes = [
        subprocess.Popen(
            [*command, str(rank)],
            env={**os.environ, **settings, **debug, VISIBLE: gpus[rank]},
            stdout=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]
    found = []
    try:
        for process in processes:
            output = process.communicate(timeout=TRIAL_SECONDS)[0].decode().splitlines()
            if process.returncode or not output:
                raise RuntimeError(f"a rank of the exchange ended with {process.returncode}")
            found.append(json.loads(output[-1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    lines = [
        line.rpartition(" : ")[2]
        for path in folder.glob(f"{log.name}.*")
        for line in path.read_text(errors="replace").splitlines()
        if " via " in line
    ]
    return {
        "ms": max(each["ms"] for each in found),
        "first_ms": max(each["first_ms"] for each in found),
        "library_mib": [each["library_mib"] for each in found],
        "via": sorted({line.rpartition(" via ")[2] for line in lines}),
        "connections": len(lines),
    }


def exchange_as_rank(folder: Path, rank: int) -> None:
    """Sum gradients as one of the ranks; print the median time and the memory of the library."""
    import torch

    from qwen3ft.machine.process_memory import nvml_process_bytes
    from qwen3ft.training.ranks import Ranks

    plan = read_record(folder / "plan.json", TrainPlan)
    on_gpu = plan.device == "cuda"
    size = plan.adapter.trainable_parameters // TENSORS
    parameters = [torch.nn.Parameter(torch.zeros(size, device=plan.device)) for _ in range(TENSORS)]

    def outside_bytes() -> int:
        if not on_gpu:
            return 0
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        whole = nvml_process_bytes() or total - free
        return whole - torch.cuda.memory_reserved()

    ranks = Ranks(rank, plan.ranks)
    before, started = outside_bytes(), time.perf_counter()
    ranks.meet(plan, folder / "meeting-place")
    times: list[float] = []
    for _ in range(FIRST_EXCHANGES + EXCHANGES):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, rank + 1.0)
        outside_bytes()
        ranks.gather([0.0])
        begun = time.perf_counter()
        loss = ranks.sum_gradients(parameters, torch.tensor(1.0, device=plan.device))
        outside_bytes()
        times.append(time.perf_counter() - begun)
        if not times[1:]:
            first = time.perf_counter() - started
    total = plan.ranks * (plan.ranks + 1) / 2
    assert all(bool((each.grad == total).all()) for each in parameters), "a wrong sum"
    assert float(loss) == plan.ranks, "a wrong loss"
    result = {
        "ms": 1000 * statistics.median(times[FIRST_EXCHANGES:]),
        "first_ms": 1000 * first,
        "library_mib": (outside_bytes() - before) / MIB,
    }
    ranks.leave()
    print(json.dumps(result), flush=True)
