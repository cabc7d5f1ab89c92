"""`qwen3ft plan` from shapes alone: what fits, how fast by estimate, why. No weights, no data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.cli_plan_view import show_sweep, show_table
from flows.cli_settings import read_batch, read_overrides
from flows.cli_view import open_console, print_json
from qwen3ft.config import TrainingConfig, load_config
from qwen3ft.model.shapes import KNOWN_MODELS
from qwen3ft.planning.fit import choose
from qwen3ft.planning.gpu_specs import GpuSpec, find_gpu_spec, require_gpu_spec
from qwen3ft.planning.table import shape_table
from qwen3ft.planning.what_if import TYPICAL_FILL, described_machine, shape_request, sweep_model
from qwen3ft.records.machine import EnvironmentReport

DEFAULT_CARD = "H200"
"""What is planned for where no GPU is visible and none is named; it was measured on."""

EVERY_MODEL = "all"


@dataclass(frozen=True)
class Question:
    """What the options of the command ask; None is 'as the settings say'."""

    model: str | None = None
    budget_gb: float | None = None
    sequence_tokens: int | None = None
    batch: str | None = None
    gpu: str | None = None
    fill: float | None = None
    sweep: bool = False

    @property
    def is_about_shapes(self) -> bool:
        """Whether any option was given that needs no run."""
        return self != Question()


def answer(question: Question, path: Path | None, settings: list[str], *, as_json: bool) -> None:
    """Show a plan from shapes, or a table of budgets and lengths."""
    overrides = read_overrides(settings)
    if question.batch is not None:
        overrides |= read_batch(question.batch)
    shorthand = {
        "model_name": question.model,
        "max_memory_gb": question.budget_gb,
        "max_sequence_length": question.sequence_tokens,
    }
    overrides |= {name: value for name, value in shorthand.items() if value is not None}
    config = load_config(path, overrides)
    environment, card = _machine(question.gpu)
    fill = TYPICAL_FILL if question.fill is None else question.fill
    if question.sweep:
        _sweep(config, environment, card, fill, as_json=as_json)
        return
    request = shape_request(config, environment, fill)
    fit = choose(request)
    table = shape_table(request, fit, card, fill)
    if as_json:
        value: dict[str, Any] = {"model": request.model_name, "workload": fit.work.to_json()}
        print_json(value | table.model_dump(mode="json"))
    else:
        show_table(open_console(), table)


def _sweep(
    config: TrainingConfig,
    environment: EnvironmentReport,
    card: GpuSpec | None,
    fill: float,
    *,
    as_json: bool,
) -> None:
    every = config.model_name == EVERY_MODEL
    names = [model.key for model in KNOWN_MODELS] if every else [config.model_name]
    sweeps = [
        sweep_model(config.model_copy(update={"model_name": name}), environment, card, fill)
        for name in names
    ]
    if as_json:
        print_json({"sweeps": [sweep.model_dump(mode="json") for sweep in sweeps]})
        return
    for sweep in sweeps:
        show_sweep(open_console(), sweep)


def _machine(gpu: str | None) -> tuple[EnvironmentReport, GpuSpec | None]:
    """The machine to plan for, and its card if that is a known one."""
    if gpu is not None and gpu.lower() not in ("this", "none"):
        card = require_gpu_spec(gpu)
        return described_machine(card), card
    from qwen3ft.machine.environment import EnvironmentManager
    from qwen3ft.machine.gpus import visible_gpus

    if gpu is None and not visible_gpus():
        card = require_gpu_spec(DEFAULT_CARD)
        return described_machine(card), card

    here = EnvironmentManager().report()
    if gpu is not None and gpu.lower() == "none":
        here = here.model_copy(update={"gpus": ()})
    return here, find_gpu_spec(here.gpus[0].name) if here.gpus else None
