"""The command `plan`: from a model's shape alone, or for the run that the settings describe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import ConfigOption, JsonOption, SetOption, read_overrides
from flows.cli.output import open_console, print_json

if TYPE_CHECKING:
    from qwen3ft.config import TrainingConfig
    from qwen3ft.planning.gpu_specs import GpuSpec
    from qwen3ft.records.machine import EnvironmentReport

DEFAULT_GPU = "H200"
"""GPU to plan for where none is visible and none is named: the one that was measured on."""

EVERY_MODEL = "all"


def plan_command(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="4b|NAME|DIR", help="A Qwen3 model; 'all' with --sweep."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", "-b", metavar="GB", help="Memory allowed.")
    ] = None,
    seq: Annotated[int | None, typer.Option("--seq", metavar="TOKENS", help="Longest row.")] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="4x16", help="Sequences per step.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help='h200, "RTX 4090", ..., this, or none.'),
    ] = None,
    fill: Annotated[
        float | None,
        typer.Option(
            "--fill",
            metavar="SHARE",
            min=0.00001,
            max=1,
            help="Mean row length as a share of the longest [0.42].",
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="A table of budgets and sequence lengths.")
    ] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict what fits a memory budget, how fast (estimated), and why, without training.

    With any option from --model to --sweep: instantly, from the model's shape.

    Without them: for the run that the settings describe. The model is quantized
    and the data read once for that.
    """
    if not sweep and (model, budget, seq, batch, gpu, fill) == (None,) * 6:
        _plan_run(config, settings, as_json=as_json)
        return
    from qwen3ft.config import load_config
    from qwen3ft.planning.workload import TYPICAL_FILL

    overrides = read_overrides(settings)
    shorthand = {"model_name": model, "max_memory_gb": budget, "max_sequence_length": seq}
    overrides |= {name: value for name, value in shorthand.items() if value is not None}
    overrides |= read_batch(batch) if batch is not None else {}
    wanted = load_config(config, overrides)
    show = _plan_sweep if sweep else _plan_shape
    show(
        wanted, *_machine(gpu, wanted.gpus), TYPICAL_FILL if fill is None else fill, as_json=as_json
    )


def read_batch(text: str) -> dict[str, int]:
    """Read `4x16`, or `64` for 64x1, as batch_size and gradient_accumulation_steps.

    Raises:
        typer.BadParameter: it is neither.
    """
    found = re.fullmatch(r"(\d+)(?:\s*[x*×]\s*(\d+))?", text.strip().lower())
    if found is None:
        raise typer.BadParameter(f"{text!r} is not like 4x16", param_hint="--batch")
    return {"batch_size": int(found[1]), "gradient_accumulation_steps": int(found[2] or 1)}


def _plan_run(config: Path | None, settings: list[str] | None, *, as_json: bool) -> None:
    from flows.cli.project import open_project, request_config
    from flows.cli.views.plan import show_plan
    from qwen3ft.machine.environment import EnvironmentManager
    from qwen3ft.operations.preview import preview_plan
    from qwen3ft.planning.table import run_table

    stack = open_project(anywhere=True)
    wanted = request_config(stack.root, config, settings, notify=True)
    planned = preview_plan(wanted)
    table = run_table(wanted, EnvironmentManager(stack.root).report(), planned)
    if as_json:
        print_json(planned.model_dump(mode="json") | {"table": table.model_dump(mode="json")})
    else:
        show_plan(open_console(), table)


def _plan_shape(
    config: TrainingConfig,
    environment: EnvironmentReport,
    gpu: GpuSpec | None,
    fill: float,
    *,
    as_json: bool,
) -> None:
    from flows.cli.views.plan import show_plan
    from qwen3ft.planning.fit import choose
    from qwen3ft.planning.table import shape_table
    from qwen3ft.planning.what_if import shape_request

    request = shape_request(config, environment, fill)
    fit = choose(request)
    table = shape_table(request, fit, gpu, fill)
    if as_json:
        value: dict[str, Any] = {"model": request.model_name, "workload": fit.work.to_json()}
        print_json(value | table.model_dump(mode="json"))
    else:
        show_plan(open_console(), table)


def _plan_sweep(
    config: TrainingConfig,
    environment: EnvironmentReport,
    gpu: GpuSpec | None,
    fill: float,
    *,
    as_json: bool,
) -> None:
    from flows.cli.views.plan import show_sweep
    from qwen3ft.model.shapes import KNOWN_MODELS
    from qwen3ft.planning.what_if import sweep_model

    every = config.model_name == EVERY_MODEL
    names = [model.key for model in KNOWN_MODELS] if every else [config.model_name]
    sweeps = [
        sweep_model(config.model_copy(update={"model_name": name}), environment, gpu, fill)
        for name in names
    ]
    if as_json:
        print_json({"sweeps": [sweep.model_dump(mode="json") for sweep in sweeps]})
        return
    for sweep in sweeps:
        show_sweep(open_console(), sweep)


def _machine(gpu: str | None, gpus: str) -> tuple[EnvironmentReport, GpuSpec | None]:
    """Return the machine to plan for, and the specification of its GPU if that is a known one.

    Args:
        gpu: What is typed: a kind, 'this' or 'none'.
        gpus: The setting; a machine that is only described has as many.
    """
    count = int(gpus) if gpus.isdecimal() else 1
    from qwen3ft.planning.gpu_specs import find_gpu_spec, require_gpu_spec
    from qwen3ft.planning.what_if import described_machine

    if gpu is not None and gpu.lower() not in ("this", "none"):
        spec = require_gpu_spec(gpu)
        return described_machine(spec, count), spec
    from qwen3ft.machine.environment import EnvironmentManager
    from qwen3ft.machine.gpus import visible_gpus

    if gpu is None and not visible_gpus():
        spec = require_gpu_spec(DEFAULT_GPU)
        return described_machine(spec, count), spec
    here = EnvironmentManager().report()
    if gpu is not None and gpu.lower() == "none":
        here = here.model_copy(update={"gpus": ()})
    return here, find_gpu_spec(here.gpus[0].name) if here.gpus else None
