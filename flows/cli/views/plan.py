"""Plans and sweeps: tables and bars on a terminal, aligned lines elsewhere."""

from __future__ import annotations

import textwrap
from itertools import groupby

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qwen3ft.planning.table import PlanTable
from qwen3ft.planning.what_if import CELL_CODES, Sweep, SweepCell
from qwen3ft.units import gb

_WIDTH = 100
"""Most columns of a table."""

_BAR = 16
"""Columns of a bar as long as the budget."""

_NUMBERS_WIDTH = 4 + (22 + 2) + (9 + 2) + (_BAR + 2)
"""Columns of a line of memory before its formula, frame included."""

_NO_FIT = "-"


def show_plan(console: Console, table: PlanTable) -> None:
    """Print a plan on one screen."""
    if not console.is_terminal:
        for line in plan_lines(table):
            console.print(line, soft_wrap=True)
        return
    settings = Table.grid(padding=(0, 2))
    settings.add_column(no_wrap=True, style="dim")
    settings.add_column(max_width=24)
    settings.add_column(style="dim")
    for each in table.settings:
        settings.add_row(each.name, Text(each.value, style="bold"), Text(each.why))
    width = min(_WIDTH, console.width)
    memory = Table.grid(padding=(0, 2))
    memory.add_column(no_wrap=True, min_width=22, style="dim")
    memory.add_column(no_wrap=True, min_width=9, justify="right")
    memory.add_column(no_wrap=True, min_width=_BAR, style="cyan")
    memory.add_column(no_wrap=True, style="dim")
    room = max(0, width - _NUMBERS_WIDTH)
    for part in table.parts:
        size_gb = gb(part.bytes)
        memory.add_row(
            part.name, f"{size_gb:.2f} GB", _bar(size_gb, table.budget_gb), _cut(part.formula, room)
        )
    total = Text(f"{table.peak_gb:.2f} GB", style="bold")
    memory.add_row("in all", total, _bar(table.peak_gb, table.budget_gb), _of_budget(table))
    more = Table.grid(padding=(0, 2))
    more.add_column(no_wrap=True, style="dim")
    more.add_column()
    for name, value in _more(table):
        more.add_row(name, Text(value))
    parts: list[RenderableType] = [
        Text(table.headline, style="bold green"),
        *(Text(""), settings, Text(""), memory),
        *((Text(""), more) if _more(table) else ()),
    ]
    console.print(Panel(Group(*parts), title=Text(table.title), title_align="left", width=width))


def plan_lines(table: PlanTable) -> list[str]:
    """Return a plan as plain lines."""
    lines = [table.title, table.headline, ""]
    for each in table.settings:
        lines += _wrapped(each.name, f"{each.value}: {each.why}")
    lines.append("")
    for part in table.parts:
        size_gb = gb(part.bytes)
        bar = _bar(size_gb, table.budget_gb)
        row = f"  {part.name:24}{size_gb:7.2f} GB  {bar:{_BAR}}  {part.formula}"
        lines.append(_cut(row, _WIDTH))
    lines.append(f"  {'in all':24}{table.peak_gb:7.2f} GB  {_of_budget(table)}")
    more = [line for name, value in _more(table) for line in _wrapped(name, value)]
    return [*lines, *([""] if more else []), *more]


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"  {name:16}{text}", _WIDTH, subsequent_indent=18 * " ")


def show_sweep(console: Console, sweep: Sweep) -> None:
    """Print a model's table of budgets and lengths, and a legend of its codes."""
    head = ["GB", *(f"{cell.sequence_tokens:,}" for cell in _rows(sweep)[0]), "longest"]
    body = [
        [
            f"{row[0].budget_gb:g}",
            *(_code(cell, sweep) for cell in row),
            _longest(sweep, row[0].budget_gb),
        ]
        for row in _rows(sweep)
    ]
    title = f"{sweep.model} on {sweep.gpu}: rows of up to ... tokens"
    if console.is_terminal:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in head:
            table.add_column(name, justify="right", no_wrap=True)
        for cells in body:
            table.add_row(*(Text(cell, style="dim" if cell == _NO_FIT else "") for cell in cells))
        console.print(table)
    else:
        console.print(title)
        for cells in [head, *body]:
            line = f"{cells[0]:>4}" + "".join(f"{cell:>12}" for cell in cells[1:])
            console.print(line, soft_wrap=True)
    for line in _legend(sweep):
        console.print(line, soft_wrap=True, style="dim")


def _rows(sweep: Sweep) -> list[list[SweepCell]]:
    return [list(cells) for _, cells in groupby(sweep.cells, key=lambda cell: cell.budget_gb)]


def _code(cell: SweepCell, sweep: Sweep) -> str:
    if not cell.fits:
        return _NO_FIT
    beyond = "°" if cell.sequence_tokens > sweep.max_position_embeddings else ""
    speed = "" if cell.tokens_per_second is None else f" {_short(cell.tokens_per_second)}"
    return f"{cell.micro_batch_size}{cell.policy}{speed}{beyond}"


def _longest(sweep: Sweep, budget_gb: float) -> str:
    tokens = sweep.longest_tokens[budget_gb]
    if tokens is None:
        return _NO_FIT
    return f"{tokens:,}" + ("°" if tokens > sweep.max_position_embeddings else "")


def _short(tokens_per_second: float) -> str:
    if tokens_per_second < 1000:
        return f"{tokens_per_second:.0f}"
    return f"{tokens_per_second / 1000:.1f}k"


def _legend(sweep: Sweep) -> list[str]:
    used = {cell.policy for cell in sweep.cells if cell.fits}
    codes = ", ".join(f"{code} {words}" for code, words in CELL_CODES.items() if code in used)
    example = f"64K 25.0k: 64 of {sweep.effective_batch_size} sequences at a time"
    lines = [
        f"{example}, what happens to activations, tokens/s.",
        f"Activations: {codes}." if codes else "Nothing fits.",
        f"Speed: {sweep.speed_basis}; rows average {sweep.fill:g} x the longest.",
    ]
    if any("°" in _code(cell, sweep) for cell in sweep.cells) or any(
        (tokens or 0) > sweep.max_position_embeddings for tokens in sweep.longest_tokens.values()
    ):
        lines.append(f"° exceeds the {sweep.max_position_embeddings:,} positions of the model.")
    return lines


def _more(table: PlanTable) -> list[tuple[str, str]]:
    """Return what else would fit, what other GPUs would do, and what was assumed."""
    rows = []
    if table.least_gb is not None:
        rows.append(("least memory", f"{table.least_gb:.2f} GB for rows as long as these"))
    if table.longest_tokens is not None:
        rows.append(
            ("longest rows", f"{table.longest_tokens:,} tokens within {table.budget_gb:g} GB")
        )
    label = "elsewhere"
    for basis, speeds in groupby(table.elsewhere, key=lambda speed: speed.basis):
        speeds_text = ", ".join(
            f"{speed.gpu} {_short(speed.tokens_per_second)}" for speed in speeds
        )
        rows.append((label, f"{speeds_text} tokens/s ({basis})"))
        label = ""
    return [*rows, *(("assumed" if n == 0 else "", note) for n, note in enumerate(table.notes))]


def _bar(size_gb: float, budget_gb: float) -> str:
    return "█" * round(_BAR * min(1.0, size_gb / budget_gb))


def _of_budget(table: PlanTable) -> str:
    return f"of {table.budget_gb:g} GB"


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: max(0, columns - 3)] + "..."
