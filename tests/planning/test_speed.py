"""Estimated speed against every measurement that is kept, and what it rests on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from support.plans import workload

from qwen3ft.errors import ConfigError
from qwen3ft.model.shapes import find_shape
from qwen3ft.planning.gpu_specs import (
    GPU_SPECS,
    PCIE_3,
    GpuSpec,
    find_gpu_spec,
    require_gpu_spec,
)
from qwen3ft.planning.speed import (
    EXCHANGE_SECONDS,
    SpeedEstimate,
    attention_share,
    estimate_speed,
    exchange_seconds,
)
from qwen3ft.planning.workload import Workload
from qwen3ft.records.plan import MemorySettings

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LEVERS = (*MemorySettings.model_fields, "device")


def measured_rows() -> Iterator[Any]:
    """Every row of ours that trained, but those that were told to keep everything."""
    for path in sorted(RESULTS.glob("speed-h*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        for row in results["rows"]:
            if row["contestant"] == "ours" and row["status"] == "ok" and row["recompute"]:
                name = f"{path.stem}: {row['case']}, {row['settings']}"
                case = results["cases"][row["case"]]
                yield pytest.param(results["machine"]["gpu"], case, row, id=name)


def fused(shape: str = "4b", **values: Any) -> Workload:
    defaults: dict[str, Any] = {
        "micro_batch_size": 64,
        "gradient_checkpointing": False,
        "loss_chunk_tokens": 2048,
        "kernels": "fused",
        "activation_bytes": 2**40,
        "chunk_tokens": 16384,
        "packing": True,
    }
    return workload(find_shape(shape)[1], **{**defaults, **values})


def estimate(gpu: GpuSpec, work: Workload, tokens: int = 108) -> SpeedEstimate | None:
    return estimate_speed(gpu, replace(work, typical_tokens=tokens))


@pytest.mark.parametrize(("gpu", "case", "row"), list(measured_rows()))
def test_estimates_lie_within_a_quarter_of_what_was_measured(
    gpu: str, case: dict[str, Any], row: dict[str, Any]
) -> None:
    """With the settings of the run's plan, for all shapes, budgets and lengths that were run."""
    levers = {name: row["levers"][name] for name in LEVERS if name in row["levers"]}
    found = estimate_speed(
        require_gpu_spec(gpu),
        fused(
            case["shape"],
            **levers,
            sequence_tokens=case["sequence_tokens"],
            step_sequences=case["sequences_per_step"],
            typical_tokens=round(fmean(row["step_tokens"]) / case["sequences_per_step"]),
        ),
    )
    assert found is not None
    assert found.measured_gpu
    assert found.tokens_per_second == pytest.approx(row["tokens_per_second"], rel=0.25)


def test_there_are_measurements_to_hold_it_against() -> None:
    """Two kinds of GPU and three shapes at least."""
    rows = [case.values for case in measured_rows()]
    assert len({gpu for gpu, _, _ in rows}) >= 2
    assert len({case["shape"] for _, case, _ in rows}) >= 3


def test_a_faster_gpu_a_smaller_model_and_less_computed_again_are_faster() -> None:
    """The estimate follows what it is made of."""
    everything = fused()
    again = fused(gradient_checkpointing=True, activation_bytes=0)
    by_gpu = [estimate(require_gpu_spec(name), everything) for name in ("l4", "4090", "h200")]
    speeds = [found.tokens_per_second for found in by_gpu if found is not None]
    assert speeds == sorted(speeds)
    assert len(speeds) == 3
    h200 = require_gpu_spec("h200")
    by_shape = [estimate(h200, fused(name)) for name in ("32b", "14b", "8b", "4b")]
    speeds = [found.tokens_per_second for found in by_shape if found is not None]
    assert speeds == sorted(speeds)
    kept, recomputed = estimate(h200, everything), estimate(h200, again)
    assert kept is not None
    assert recomputed is not None
    assert kept.tokens_per_second > 1.1 * recomputed.tokens_per_second


def test_what_was_never_measured_says_so() -> None:
    """Each estimate is called one; of GPUs that were not trained on it is computed."""
    for gpu in GPU_SPECS:
        found = estimate(gpu, fused())
        assert found is not None
        assert "estimate" in found.basis
        assert ("computed, not measured" in found.basis) == (gpu.name not in ("H100", "H200"))


def test_no_estimate_is_made_of_what_the_formula_is_not_about() -> None:
    """The plain path and CPUs."""
    assert estimate(GPU_SPECS[0], fused(kernels="plain")) is None
    assert estimate(GPU_SPECS[0], fused(device="cpu")) is None


def test_attention_reaches_a_share_of_the_peak_at_any_length() -> None:
    """Between nothing and all of it, from one token to the longest a config allows."""
    assert all(0 < attention_share(tokens) < 0.6 for tokens in (1, 256, 16383, 16384, 262144))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("h200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("A100", "A100 80GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA L4", "L4"),
        ("rtx 4060 ti 16gb", "RTX 4060 Ti 16GB"),
    ],
)
def test_gpus_are_found_by_what_people_and_drivers_call_them(said: str, name: str) -> None:
    """Whatever the case, the maker's name and the form."""
    assert require_gpu_spec(said).name == name


def test_every_gpu_is_found_by_its_own_name_and_no_two_are_one() -> None:
    """Also as commands write it, in small letters with dashes."""
    for gpu in GPU_SPECS:
        assert find_gpu_spec(gpu.name) is gpu
        assert find_gpu_spec(gpu.name.lower().replace(" ", "-")) is gpu


def test_an_unknown_gpu_is_refused_with_those_known() -> None:
    """And a command that works."""
    with pytest.raises(ConfigError, match="Voodoo") as caught:
        require_gpu_spec("Voodoo 2")
    assert "RTX 4090" in caught.value.why


def on_ranks(gpu: GpuSpec, ranks: int, sequences: int = 256) -> SpeedEstimate:
    found = estimate_speed(gpu, replace(fused(), ranks=ranks, step_sequences=sequences))
    assert found is not None
    return found


def test_ranks_share_the_rows_of_a_step_and_pay_for_the_exchange() -> None:
    """Nearly as much faster as there are; less over a slower link, and with less to share."""
    gpu = require_gpu_spec("H200")
    slow = replace(gpu, nvlink_gbps=0.0, bus_gbps=PCIE_3)
    alone = before = on_ranks(gpu, 1).tokens_per_second
    for ranks in (2, 4, 8):
        fast = on_ranks(gpu, ranks)
        speed = fast.tokens_per_second
        assert before < on_ranks(slow, ranks).tokens_per_second < speed < ranks * alone
        assert speed > 0.7 * ranks * alone
        assert "x one GPU; estimate; computed, not measured" in fast.basis
        before = speed
    assert on_ranks(gpu, 8, sequences=64).tokens_per_second < before
    assert on_ranks(gpu, 1) == estimate_speed(gpu, fused(step_sequences=256))


def test_an_exchange_moves_the_gradients_twice_but_for_the_ranks_own_share() -> None:
    work = fused()
    size = 4 * work.adapter.trainable_parameters
    for ranks in (2, 8):
        seconds = exchange_seconds(replace(work, ranks=ranks), 1e9)
        assert seconds == pytest.approx(2 * size * (ranks - 1) / ranks / 1e9 + EXCHANGE_SECONDS)
    assert exchange_seconds(work, 1e9) == 0
