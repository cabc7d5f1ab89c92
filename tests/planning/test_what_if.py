"""What `qwen3ft plan` knows without weights and data: settings, tables, budgets by lengths."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.plans import manifest, plan_for, snapshot
from typer.testing import CliRunner

from flows.cli import app
from flows.cli.views.plan import plan_lines, show_plan, show_sweep
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import ConfigError, InsufficientMemoryError, ModelNotFoundError
from qwen3ft.model.adapter import plan_adapter
from qwen3ft.model.shapes import KNOWN_MODELS
from qwen3ft.planning.fit import choose, fit_or_none
from qwen3ft.planning.gpu_specs import require_gpu_spec
from qwen3ft.planning.plan import build_plan
from qwen3ft.planning.table import PlanTable, alone_of, run_table, shape_table, speed_of
from qwen3ft.planning.what_if import (
    BUDGETS_GB,
    TYPICAL_FILL,
    Sweep,
    described_machine,
    shape_request,
    sweep_model,
)
from qwen3ft.planning.workload import workload_of
from qwen3ft.report.figures import write_png
from qwen3ft.report.plan_section import plan_figure, plan_markdown
from qwen3ft.units import GIB

ROOT = Path(__file__).parents[2]
H200 = require_gpu_spec("h200")
SHORT = (256, 2048)


def table_for(gpu: str = "h200", **wanted: Any) -> PlanTable:
    spec = require_gpu_spec(gpu)
    request = shape_request(TrainingConfig(**wanted), described_machine(spec))
    return shape_table(request, choose(request), spec, TYPICAL_FILL)


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    """Of one model, with two lengths."""
    config = TrainingConfig(model_name="4b")
    return sweep_model(config, described_machine(H200), H200, TYPICAL_FILL, lengths_tokens=SHORT)


def console(*, terminal: bool) -> Console:
    return Console(force_terminal=terminal, width=100, record=True, no_color=True)


@pytest.mark.parametrize(("key", "budget_gb"), [("4b", 13.0), ("14b", 16.0)])
def test_a_plan_from_shapes_is_that_of_a_run_with_such_rows(key: str, budget_gb: float) -> None:
    """Every setting and every byte, for the same machine and the same lengths."""
    config = TrainingConfig(model_name=key, max_memory_gb=budget_gb)
    machine = described_machine(H200)
    request = shape_request(config, machine, fill=100 / 256)
    rows = manifest(longest_tokens=256)
    adapter = plan_adapter(config, request.shape)
    plan = build_plan(config, machine, snapshot(request.shape), adapter, rows)
    fit = choose(request)
    assert fit.work == workload_of(plan)
    assert fit.parts == plan.predicted
    assert fit.reasons.items() <= plan.reasons.items()


def test_the_table_says_what_fits_how_fast_and_why() -> None:
    """In its first line; each setting has a sentence, and the parts make up the peak."""
    table = table_for(model_name="4b", max_memory_gb=13.0)
    assert table.headline.startswith("Fits: up to 1")
    assert "of 13 GB" in table.headline
    assert "tokens/s (estimate" in table.headline
    assert {"batch", "computed again", "host memory"} <= {line.name for line in table.settings}
    assert all(line.why.endswith(".") for line in table.settings)
    assert sum(part.bytes for part in table.parts) / GIB == pytest.approx(table.peak_gb)
    assert table.least_gb is not None
    assert table.least_gb < table.peak_gb <= table.budget_gb
    assert {speed.gpu for speed in table.elsewhere} >= {"H100", "RTX 4090"}
    assert any("0.42 x 256" in note for note in table.notes)


def test_a_gpu_that_was_never_measured_says_computed() -> None:
    """In the first line."""
    assert "computed, not measured" in table_for("rtx 4090", model_name="0.6b").headline
    assert "was measured" in table_for("h100", model_name="0.6b").headline


def test_several_gpus_are_compared_with_the_plan_of_one() -> None:
    """Not with the settings of several on one, which may be slower than what one would take."""
    spec, speeds = require_gpu_spec("H200"), []
    for ranks in (1, 2):
        config = TrainingConfig(model_name="14b", gpus=str(ranks))
        request = shape_request(config, described_machine(spec, ranks))
        work = choose(request).work
        speeds.append(speed_of(work, spec, alone_of(request, work)))
    one, two = speeds
    assert one is not None
    assert two is not None
    assert one.speedup == 1
    assert two.speedup == pytest.approx(two.tokens_per_second / one.tokens_per_second)


def test_a_length_beyond_the_models_positions_is_noted() -> None:
    """It may fit the memory and still be too long for the model."""
    long = table_for(model_name="0.6b", max_sequence_length=65536, max_memory_gb=40.0)
    assert any("40,960" in note for note in long.notes)


def test_a_runs_table_has_its_rows_and_steps() -> None:
    """Beside what a table from shapes has; on a CPU without an estimate."""
    plan = plan_for(gpu_gb=None)
    machine = described_machine(H200).model_copy(update={"gpus": ()})
    table = run_table(TrainingConfig(), machine, plan)
    shown = {line.name: line for line in table.settings}
    assert "7,473 rows" in shown["data"].value
    assert shown["steps"].value == f"{plan.total_steps:,} at most"
    assert table.speed is None
    assert "no estimate of speed" in table.headline
    assert table.peak_gb == pytest.approx(plan.predicted_peak_bytes / GIB)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_fits_a_hundred_columns(terminal: bool) -> None:
    """With every setting, part and number in it, whether on a terminal or in a file."""
    table = table_for(model_name="4b", max_memory_gb=13.0)
    shown = console(terminal=terminal)
    show_plan(shown, table)
    text = shown.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    for name in [line.name for line in table.settings] + [part.name for part in table.parts]:
        assert name in text
    for part in table.parts:
        assert f"{part.bytes / GIB:.2f} GB" in text
    assert not terminal or "╭" in text
    assert terminal or text.splitlines() == plan_lines(table)


def test_markdown_and_picture_have_every_part(tmp_path: Path) -> None:
    """For the pages of a run."""
    table = table_for(model_name="14b", max_memory_gb=16.0)
    markdown = plan_markdown(table)
    assert markdown.startswith(f"# {table.title}\n\n**{table.headline}**\n")
    assert all(f"| {part.name} | {part.bytes / GIB:.3f} |" in markdown for part in table.parts)
    assert all(f"| {line.name} | {line.value} |" in markdown for line in table.settings)
    figure = plan_figure(table)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [p.name for p in table.parts]
    widths = [bar.get_width() for bar in axes.patches]
    assert sum(widths) == pytest.approx(table.peak_gb)
    assert write_png(figure, tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_each_cell_is_the_planners_own_answer(sweep: Sweep) -> None:
    """A sample of them, against a plan made for it alone."""
    cells = {(cell.budget_gb, cell.sequence_tokens): cell for cell in sweep.cells}
    assert len(cells) == len(BUDGETS_GB) * len(SHORT)
    for budget, tokens in ((6, 2048), (13, 256), (80, 2048)):
        table = table_for(model_name="4b", max_memory_gb=float(budget), max_sequence_length=tokens)
        cell = cells[budget, tokens]
        assert cell.fits
        assert cell.peak_gb == pytest.approx(table.peak_gb)
        assert table.speed is not None
        assert cell.tokens_per_second == pytest.approx(table.speed.tokens_per_second)


def test_more_memory_is_never_slower_and_never_holds_less(sweep: Sweep) -> None:
    """Down each column, up to what the planner's own ranking and the estimate differ by."""
    for tokens in SHORT:
        column = [
            cell.tokens_per_second or 0 for cell in sweep.cells if cell.sequence_tokens == tokens
        ]
        assert all(later > 0.98 * earlier for earlier, later in pairwise(column))
    lengths = [sweep.longest_tokens[float(budget)] or 0 for budget in BUDGETS_GB]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("budget_gb", [6, 13])
def test_the_longest_rows_fit_and_longer_ones_do_not(sweep: Sweep, budget_gb: int) -> None:
    """To the multiple of 8 tokens."""
    tokens = sweep.longest_tokens[float(budget_gb)]
    assert tokens is not None
    for length, fits in ((tokens, True), (tokens + 8, False)):
        wanted = {"max_memory_gb": float(budget_gb), "max_sequence_length": length}
        request = shape_request(TrainingConfig(model_name="4b", **wanted), described_machine(H200))
        assert (fit_or_none(request) is not None) == fits


def test_a_sweep_leaves_out_budgets_beyond_the_gpu() -> None:
    """An RTX 4090 has 24 GB."""
    gpu = require_gpu_spec("rtx 4090")
    config = TrainingConfig(model_name="14b")
    found = sweep_model(config, described_machine(gpu), gpu, TYPICAL_FILL, lengths_tokens=(2048,))
    assert {cell.budget_gb for cell in found.cells} == {6, 8, 12, 13, 16, 24}
    assert any(not cell.fits for cell in found.cells)


@pytest.fixture(scope="module")
def full_sweep() -> Sweep:
    """All budgets of a small model on a large GPU."""
    config = TrainingConfig(model_name="0.6b")
    return sweep_model(config, described_machine(H200), H200, TYPICAL_FILL)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_sweep_fits_a_hundred_columns(full_sweep: Sweep, terminal: bool) -> None:
    """One line a budget, each cell with its code, and the codes explained."""
    shown = console(terminal=terminal)
    show_sweep(shown, full_sweep)
    text = shown.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "estimate" in text
    assert "131,072" in text
    assert all(f"{budget:>3}" in text for budget in BUDGETS_GB)
    assert "° exceeds the 40,960" in text


def test_the_command_answers_without_torch_weights_or_a_project(tmp_path: Path) -> None:
    """From any folder; nothing heavy is loaded and nothing is written."""
    heavy = {"torch", "transformers", "prefect", "mlflow", "datasets", "huggingface_hub"}
    arguments = ["qwen3ft", "plan", "--model", "4b", "--budget", "13", "--json"]
    code = (
        f"import sys\nfrom flows.cli import main\nsys.argv = {arguments!r}\n"
        f"try: main()\nexcept SystemExit: sys.exit(str({heavy!r} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stderr.strip() == "set()"
    found = json.loads(done.stdout)
    assert found["model"] == "Qwen/Qwen3-4B-Thinking-2507"
    assert found["workload"]["kernels"] == "fused"
    assert found["budget_gb"] == 13
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "kind", "command"),
    [
        (["--budget", "-3"], ConfigError, "settings max_memory_gb"),
        (["--budget", "5000"], ConfigError, "settings max_memory_gb"),
        (["--gpu", "Voodoo"], ConfigError, "plan"),
        (["--model", "7b"], ModelNotFoundError, "plan"),
        (["--model", "4b", "--budget", "1"], InsufficientMemoryError, "plan"),
    ],
)
def test_bad_questions_are_errors_with_a_next_command(
    arguments: list[str], kind: type[Exception], command: str
) -> None:
    """A budget that is negative or absurd, unknown names, too little memory."""
    done = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(done.exception, kind)
    assert getattr(done.exception, "next_command", "").startswith(f"qwen3ft {command}")


def test_wrong_usage_of_plan_is_exit_code_two() -> None:
    """What cannot be read is no question."""
    for arguments in (["--batch", "many"], ["--fill", "2"], ["--seq", "long"]):
        assert CliRunner().invoke(app, ["plan", *arguments]).exit_code == 2


def test_settings_and_a_config_file_count_beside_the_options(tmp_path: Path) -> None:
    """The options win over the file; --set is as everywhere."""
    path = tmp_path / "c.yaml"
    path.write_text("lora_r: 16\nmax_memory_gb: 20\n")
    arguments = ["plan", "-m", "0.6b", "-b", "8", "--batch", "8x2", "-c", str(path), "--json"]
    done = CliRunner().invoke(app, [*arguments, "--set", "gradient_checkpointing=on"])
    found = json.loads(done.stdout)
    assert found["budget_gb"] == 8
    assert found["workload"]["gradient_checkpointing"] is True
    again = next(line for line in found["settings"] if line["name"] == "batch")
    assert again["value"].partition(" x ")[0] in {"1", "2", "4", "8", "16"}


@pytest.mark.slow
def test_a_sweep_of_every_model_is_one_object_each() -> None:
    """Smallest first, by the names on the hub."""
    done = CliRunner().invoke(app, ["plan", "-m", "all", "--sweep", "--gpu", "rtx-3060", "--json"])
    names = [found["model"] for found in json.loads(done.stdout)["sweeps"]]
    assert names == [model.hub_name for model in KNOWN_MODELS]
