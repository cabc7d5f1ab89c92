"""A plan's table as markdown for Prefect and MLflow, and its predicted memory as a picture.

Guarantees: pure functions of `PlanTable`; drawn without a display and without pyplot's state.
"""

from __future__ import annotations

from typing import Any

from qwen3ft.planning.table import PlanTable
from qwen3ft.report.figures import new_figure
from qwen3ft.units import gb


def plan_markdown(table: PlanTable) -> str:
    """Settings with their reasons, then predicted memory by part."""
    lines = [f"# {table.title}", "", f"**{table.headline}**", ""]
    lines += ["| setting | value | why |", "|---|---|---|"]
    lines += [
        f"| {line.name} | {_cell(line.value)} | {_cell(line.why)} |" for line in table.settings
    ]
    lines += ["", "| predicted memory | GB | share of budget | from |", "|---|---:|---:|---|"]
    for part in table.parts:
        size_gb = gb(part.bytes)
        share = size_gb / table.budget_gb
        lines.append(f"| {part.name} | {size_gb:.3f} | {share:.1%} | {_cell(part.formula)} |")
    share = table.peak_gb / table.budget_gb
    total = f"| **in all** | **{table.peak_gb:.3f}** | **{share:.1%}** "
    lines.append(f"{total}| of {table.budget_gb:g} GB |")
    if (speed := table.speed) is not None:
        told = f"{speed.tokens_per_second:,.0f} tokens/s, {speed.seconds_per_step:.2f} s a step"
        lines += ["", f"Speed on {speed.card}, {speed.basis}: {told}."]
    lines += ["", *(f"> {note}\n" for note in table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def plan_figure(table: PlanTable) -> Any:
    """Predicted parts, each from where the one before ends, up to the budget.

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
