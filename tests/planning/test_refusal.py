"""Refusals: what they offer fits, and each of their commands shows it."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import InsufficientMemoryError
from qwen3ft.planning.fit import choose, fit_or_none
from qwen3ft.planning.gpu_specs import require_gpu_spec
from qwen3ft.planning.what_if import described_machine, shape_request
from qwen3ft.planning.workload import TYPICAL_FILL

H200 = require_gpu_spec("h200")


@pytest.mark.parametrize(
    ("wanted", "offers"),
    [
        ({"model_name": "14b", "max_sequence_length": 2048, "max_memory_gb": 9.0}, 2),
        ({"model_name": "4b", "max_sequence_length": 32768, "max_memory_gb": 4.5}, 3),
        ({"model_name": "8b", "max_memory_gb": 6.0, "lora_r": 64}, 2),
        ({"model_name": "8b", "max_memory_gb": 6.0, "quantization": ["nf4"], "gpus": "2"}, 2),
    ],
)
@pytest.mark.parametrize("fill", [0.0003, TYPICAL_FILL, 0.7213, 1.0])
def test_each_command_of_a_refusal_fits(wanted: dict[str, Any], offers: int, fill: float) -> None:
    """More memory, shorter rows, a smaller model: all true, however long rows typically are."""
    machine = described_machine(H200, int(wanted.get("gpus", 1)))
    request = shape_request(TrainingConfig(**wanted), machine, fill)
    with pytest.raises(InsufficientMemoryError) as caught:
        choose(request)
    error = caught.value
    assert "part" in error.what
    assert "need" in error.what
    assert "left" in error.what
    assert error.next_command in error.facts["commands"]
    assert len(error.facts["commands"]) >= offers
    for command in error.facts["commands"]:
        assert command in error.why
        done = CliRunner().invoke(app, [*shlex.split(command)[1:], "--json"])
        assert done.exception is None, command
        found = json.loads(done.stdout)
        assert found["peak_gb"] <= found["budget_gb"]


def test_the_smaller_model_is_the_largest_that_fits() -> None:
    """The next one up does not; none is offered that was not made for such rows."""
    config = TrainingConfig(model_name="32b", max_memory_gb=8.0)
    with pytest.raises(InsufficientMemoryError) as caught:
        choose(shape_request(config, described_machine(H200)))
    assert caught.value.facts["would_fit"]["model_name"] == "Qwen/Qwen3-8B"
    larger = config.model_copy(update={"model_name": "14b"})
    assert fit_or_none(shape_request(larger, described_machine(H200))) is None
    far = config.model_copy(update={"max_sequence_length": 131072, "max_memory_gb": 3.0})
    with pytest.raises(InsufficientMemoryError) as caught:
        choose(shape_request(far, described_machine(H200)))
    assert "model_name" not in caught.value.facts["would_fit"]


def test_more_memory_is_the_first_advice_only_where_the_gpu_has_it() -> None:
    """On a GPU of 12 GB nobody can have 20."""
    config = TrainingConfig(model_name="14b", max_memory_gb=12.0, max_sequence_length=32768)
    machines = {name: described_machine(require_gpu_spec(name)) for name in ("rtx 3060", "h200")}
    nexts = {}
    for name, machine in machines.items():
        with pytest.raises(InsufficientMemoryError) as caught:
            choose(shape_request(config, machine))
        nexts[name] = caught.value.next_command
    assert "--budget 12 " in nexts["rtx 3060"]
    assert "--gpu rtx-3060" in nexts["rtx 3060"]
    assert "--budget 12 " not in nexts["h200"]
