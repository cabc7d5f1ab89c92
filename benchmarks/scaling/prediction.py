"""The planner's speed-ups over several links: computed, not measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen3ft.config import TrainingConfig
from qwen3ft.planning.fit import choose
from qwen3ft.planning.gpu_specs import PCIE_3, PCIE_4, PCIE_5, require_gpu_spec
from qwen3ft.planning.speed import LAUNCH_SECONDS_PER_BLOCK, exchange_seconds
from qwen3ft.planning.table import alone_of, speed_of
from qwen3ft.planning.what_if import described_machine, shape_request
from qwen3ft.planning.workload import Workload

RANKS = (2, 4, 8)
LINKS = {"NVLink 4": 0.0, "PCIe 5": PCIE_5, "PCIe 4": PCIE_4, "PCIe 3": PCIE_3}
"""Rate of a link in 1e9 bytes a second; 0 for the GPU's own NVLink."""


def predict(model: str) -> list[dict[str, Any]]:
    """Return the planner's speed-ups on H200s, with 256 rows of up to 256 tokens a step."""
    gpu, rows = require_gpu_spec("H200"), []
    plans = {}
    for ranks in RANKS:
        config = TrainingConfig(
            model_name=model, batch_size=16, gradient_accumulation_steps=16, gpus=str(ranks)
        )
        request = shape_request(config, described_machine(gpu, ranks))
        work = choose(request).work
        plans[ranks] = work, alone_of(request, work)
    for link, rate in LINKS.items():
        linked = replace(gpu, nvlink_gbps=0.0, bus_gbps=rate) if rate else gpu
        for ranks, (work, alone) in plans.items():
            found = speed_of(work, linked, alone)
            assert found is not None
            exchange = exchange_seconds(work, linked.link_gbps * 1e9)
            rows.append(
                {
                    "link": link,
                    "ranks": ranks,
                    "speedup": round(found.speedup, 2),
                    "efficiency": round(found.speedup / ranks, 3),
                    "exchange_ms": round(1000 * exchange, 2),
                    "exchange_share": round(exchange / found.seconds_per_step, 4),
                }
            )
    return rows


def expected(work: Workload, alone_step_ms: float | None) -> list[dict[str, Any]]:
    """Return the efficiency to expect of several H200s from the measured step of one.

    Computing is shared evenly, but takes no less than the launches of one micro-batch.
    """
    gpu, rows = require_gpu_spec("H200"), []
    launches = LAUNCH_SECONDS_PER_BLOCK * work.shape.num_hidden_layers
    for link, rate in LINKS.items() if alone_step_ms else ():
        for ranks in RANKS:
            alone = alone_step_ms / 1000
            exchange = exchange_seconds(replace(work, ranks=ranks), (rate or gpu.nvlink_gbps) * 1e9)
            step = max(alone / ranks, launches) + exchange
            rows.append(
                {
                    "link": link,
                    "ranks": ranks,
                    "exchange_ms": round(1000 * exchange, 2),
                    "exchange_share": round(exchange / step, 4),
                    "efficiency": round(alone / ranks / step, 3),
                    "efficiency_without_launches": round(
                        alone / ranks / (alone / ranks + exchange), 3
                    ),
                }
            )
    return rows
