"""Results of the `qwen3ft` command: panels and tables on a terminal, plain lines elsewhere.

Views only print what they are given: they read no files, ask no servers and decide nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qwen3ft.evaluation.wording import format_seconds
from qwen3ft.logs import mask_secrets, mask_values
from qwen3ft.records.machine import EnvironmentReport
from qwen3ft.records.run_card import RunCard
from qwen3ft.text.commands import runnable
from qwen3ft.units import gb, size_text

if TYPE_CHECKING:
    from deployments.stack import StackStatus
    from qwen3ft.errors import FinetuneError
    from qwen3ft.operations.retention import Removal
    from qwen3ft.records.requests import ParityReport
    from qwen3ft.registry.moves import History


def show_card(console: Console, card: RunCard, link: Callable[[str], str] = str) -> None:
    """Show the result of a run on one screen; `link` makes addresses that open with one click."""
    from qwen3ft.report.facts import card_facts

    rows = {}
    for fact in card_facts(card):
        rows[fact.label] = fact.text
        if fact.label == "exact match":
            rows |= {
                f"  {split}": f"{base:.1%} → {tuned:.1%} of {count}"
                for split, (base, tuned, count) in card.scores_by_split.items()
            }
    stages = card.seconds_by_stage.items()
    rows["stages"] = "  ".join(f"{name} {format_seconds(s)}" for name, s in stages)
    rows["verdict"] = card.verdict
    rows |= {"note" if n == 1 else f"note {n}": note for n, note in enumerate(card.notes, 1)}
    urls = {"Prefect": card.prefect_url, "MLflow": card.mlflow_url}
    for name, url in urls.items():
        if url is None:
            rows[name] = "recorded without a server: no page"
    # ASCII arrows: a log file or a remote terminal may not be UTF-8
    rows = {name: value.replace("→", "->") for name, value in rows.items() if value}
    show_sections(console, card.title, {"": rows})
    _show_links(console, {name: link(url) for name, url in urls.items() if url})


def show_status(console: Console, status: StackStatus, link: Callable[[str], str] = str) -> None:
    """Print one line per process, then the deployment; `link` as in `show_card`."""
    rows: dict[str, str] = {
        service.name: f"{'up' if service.healthy else 'down'}"
        + (f"  pid {service.pid}" if service.pid else "")
        + (f"  {service.log}" if service.url is None or not service.healthy else "")
        for service in status.services
    }
    registered = "registered" if status.deployment_registered else "not registered"
    schedule = "nightly schedule on" if status.schedule_active else "nightly schedule off"
    known = f"{registered}, {schedule}" if status.prefect_url else "unknown: the server is down"
    rows["deployment"] = f"{status.deployment}  {known}"
    for gpu in status.gpus:
        rows[f"GPU {gpu.index}"] = f"{gpu.name}  {gpu.held_by or 'free'}"
    show_sections(console, status.root, {"": rows})
    urls = {"Prefect": status.prefect_url, "MLflow": status.mlflow_page}
    _show_links(console, {name: link(url) for name, url in urls.items() if url})


def show_report(console: Console, report: EnvironmentReport, problems: Iterable[str]) -> None:
    """Print what the machine has, and what is missing."""
    rows = {
        "python": f"{report.python_version}  {report.python_executable}",
        "platform": f"{report.platform}, {report.cpu_count} CPUs",
        "packages": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "memory": f"{size_text(report.host_free_bytes, 1)} free "
        f"of {size_text(report.host_total_bytes, 1)}",
        "disk": f"{size_text(report.disk_free_bytes, 1)} free",
    }
    for gpu in report.gpus:
        rows[f"GPU {gpu.index}"] = (
            f"{gpu.name}, {size_text(gpu.free_bytes, 1)} free of {size_text(gpu.total_bytes, 1)}, "
            f"driver {gpu.driver_version}"
        )
    if not report.gpus:
        rows["GPU"] = (
            "none with CUDA: runs train on the CPU, which is meant for the embedded model only"
        )
    rows |= {f"problem {n}": problem for n, problem in enumerate(problems, 1)}
    show_sections(console, "This machine", {"": rows})


def show_history(console: Console, history: History) -> None:
    """Print the versions in use, then one line per move, newest first."""
    aliases = history.aliases.model_dump().items()
    in_use = ", ".join(f"{name} {version}" for name, version in aliases if version)
    console.print(f"{history.registered_model}: {in_use or 'nothing is in use'}", soft_wrap=True)
    for move in reversed(history.moves):
        when = f"{move.at.astimezone():%Y-%m-%d %H:%M:%S}"
        versions = f"{move.replaced or '-'} -> {move.version}"
        verdict = move.verdict if move.action == "promotion" else ""
        why = "; ".join(part for part in (move.reason, verdict) if part)
        line = f"  {when}  {move.action:9}  {versions:9}  of run {move.run or '?'}, by {move.by}"
        console.print(f"{line}: {why}" if why else line, soft_wrap=True)


def show_removals(console: Console, removals: Sequence[Removal], root: Path) -> None:
    """Print a table of what was or would be removed; paths are relative to the project folder."""
    if not removals:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("GB", justify="right")
    for title in ("what", "why", "where"):
        table.add_column(title, overflow="fold")
    for removal in removals:
        path = Path(removal.path)
        where = path.relative_to(root) if path.is_relative_to(root) else path
        texts = map(mask_secrets, (removal.why, str(where)))
        table.add_row(f"{gb(removal.size_bytes):.2f}", removal.kind, *texts)
    console.print(table)


def show_export(console: Console, folder: Path, report: ParityReport) -> None:
    """Print how each form of an exported model compares with the adapter."""
    console.print(f"{folder}: compared on {report.rows} held-out rows", soft_wrap=True)
    for score in report.scores:
        loss = ""
        if score.answer_loss is not None and score.loss_drift is not None:
            loss = f"answer loss {score.answer_loss:.4f} ({score.loss_drift:+.4f})"
        console.print(
            f"  {score.form:16}  exact match {score.exact_match:6.1%}  {loss:29}  same answers "
            f"{score.same_answers:.1%}  lost {score.lost_answers:.1%}",
            soft_wrap=True,
        )
    console.print(f"How to serve it: {folder / 'SERVING.md'}", soft_wrap=True)


def show_error(console: Console, error: FinetuneError) -> None:
    """Print what went wrong, why, and the next command."""
    for label, text, style in (
        ("What", error.what, "bold red"),
        ("Why", error.why, ""),
        ("Next", runnable(error.next_command), "bold"),
    ):
        if text:
            console.print(Text(f"{label}:  ".ljust(7)) + Text(text, style=style), soft_wrap=True)


def _show_links(console: Console, links: Mapping[str, str]) -> None:
    """Print links whole and outside of any frame, so that a terminal can open them."""
    for name, url in links.items():
        console.print(f"  {name:14} {url}", soft_wrap=True, markup=False)


def show_sections(console: Console, title: str, sections: Mapping[str, Mapping[str, str]]) -> None:
    """Print sections of names and values: a panel on a terminal, plain lines elsewhere."""
    title, sections = mask_secrets(title), mask_values(sections)
    if not console.is_terminal:
        for heading, rows in sections.items():
            console.print(heading or title)
            for name, value in rows.items():
                console.print(f"  {name:14} {value}", soft_wrap=True)
        return
    parts: list[RenderableType] = []
    for heading, rows in sections.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(Text(name), Text(value))
        parts += [Text(f"\n{heading}"), table] if heading else [table]
    console.print(Panel(Group(*parts), title=Text(title), title_align="left", expand=False))
