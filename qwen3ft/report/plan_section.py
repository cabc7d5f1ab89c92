"""A plan as markdown for Prefect and MLflow, and its predicted memory as a figure."""

from __future__ import annotations

from typing import Any

from qwen3ft.planning.table import PlanTable
from qwen3ft.report.figures import new_figure
from qwen3ft.report.safe_text import markdown_table
from qwen3ft.units import gb


def plan_markdown(table: PlanTable) -> str:
    """Render the settings with their reasons, then the predicted memory by part."""
    settings = [(line.name, _cell(line.value), _cell(line.why)) for line in table.settings]
    parts = [
        (
            part.name,
            f"{gb(part.bytes):.3f}",
            f"{gb(part.bytes) / table.budget_gb:.1%}",
            _cell(part.formula),
        )
        for part in table.parts
    ]
    share = table.peak_gb / table.budget_gb
    peak, of = (f"**{table.peak_gb:.3f}**", f"**{share:.1%}**"), f"of {table.budget_gb:g} GB"
    lines = [f"# {table.title}", "", f"**{table.headline}**", ""]
    lines += [*markdown_table(("setting", "value", "why"), settings), ""]
    lines += markdown_table(
        ("predicted memory", "GB", "share of budget", "from"),
        [*parts, ("**total**", *peak, of)],
        right=("GB", "share of budget"),
    )
    if (speed := table.speed) is not None:
        rate = f"{speed.tokens_per_second:,.0f} tokens/s, {speed.seconds_per_step:.2f} s per step"
        lines += ["", f"Speed on {speed.gpu}, {speed.basis}: {rate}."]
    lines += ["", *(f"> {note}\n" for note in table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def plan_figure(table: PlanTable) -> Any:
    """Draw the predicted parts as a waterfall up to the budget.

    Returns:
        A `matplotlib.figure.Figure`; `qwen3ft.report.figures.write_png` turns it into a file.
    """
    figure = new_figure(10, 0.35 * len(table.parts) + 1.6)
    axes = figure.add_subplot()
    axes.set(title=f"Predicted memory: {table.title}", xlabel="GB (2**30 bytes)")
    axes.grid(visible=True, axis="x", alpha=0.3)
    left_gb = 0.0
    for place, part in enumerate(table.parts):
        size_gb = gb(part.bytes)
        axes.barh(place, size_gb, left=left_gb, color="tab:blue")
        left_gb += size_gb
        axes.text(left_gb, place, f" {size_gb:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(table.parts)), [part.name for part in table.parts])
    axes.invert_yaxis()
    axes.axvline(table.budget_gb, color="tab:red", label=f"budget {table.budget_gb:.2f} GB")
    axes.axvline(
        table.peak_gb, color="tab:gray", linestyle="--", label=f"predicted {table.peak_gb:.2f} GB"
    )
    axes.set_xlim(0, 1.08 * max(table.budget_gb, table.peak_gb))
    axes.legend(loc="lower left")
    return figure


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
