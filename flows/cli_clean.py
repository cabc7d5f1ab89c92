"""The command `clean`: what old runs left on disk and in the Prefect server's history."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from deployments.history import count_old, remove_old
from deployments.stack import Stack
from flows.cli_project import open_project, request_config, use_local_services
from flows.cli_view import open_console, print_json, say
from qwen3ft.operations.retention import Removal, RetentionPolicy, plan_removals, remove
from qwen3ft.registry.versions import find_protected
from qwen3ft.tracking.connection import default_tracking_uri
from qwen3ft.units import gb, size_text


def clean(
    policy: RetentionPolicy, path: Path | None, settings: list[str], *, dry_run: bool, as_json: bool
) -> None:
    """Show what goes and why, and remove it unless it is a dry run.

    Raises:
        TrackingUnavailableError: what is in use cannot be asked for; nothing was removed.
        RequestError: a run to be abandoned is none; nothing was removed.
    """
    stack = open_project()
    config = request_config(stack.root, path, settings)
    use_local_services(stack)
    removals = plan_removals(config, find_protected(default_tracking_uri()), policy)
    gone = removals if dry_run else remove(removals)
    # Last: it takes long where there is much of it, and what is in use was asked for before.
    flow_runs = _clean_history(stack, policy.keep_days, dry_run=dry_run)
    size_bytes = sum(removal.size_bytes for removal in gone)
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "removals": [removal.model_dump(mode="json") for removal in gone],
                "flow_runs": flow_runs,
                "freed_bytes": 0 if dry_run else size_bytes,
            }
        )
        return
    _show(gone, stack.root)
    size = size_text(size_bytes)
    history = "" if flow_runs is None else f"; {flow_runs} flow run(s) of the server's history"
    verb = "To be removed" if dry_run else "Removed"
    open_console().print(f"{verb}: {len(gone)} folder(s), {size}{history}.")


def _clean_history(stack: Stack, keep_days: float, *, dry_run: bool) -> int | None:
    """How many flow runs are (to be) removed; None while the server is down."""
    if stack.status().prefect_url is None:
        say("The Prefect server is down; its history stays. To clean it too: qwen3ft up")
        return None
    return (count_old if dry_run else remove_old)(stack.layout(), keep_days)


def _show(removals: Sequence[Removal], root: Path) -> None:
    if not removals:
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("GB", justify="right")
    for title in ("what", "why", "where"):
        table.add_column(title, overflow="fold")
    for removal in removals:
        path = Path(removal.path)
        where = path.relative_to(root) if path.is_relative_to(root) else path
        table.add_row(f"{gb(removal.size_bytes):.2f}", removal.kind, removal.why, str(where))
    open_console().print(table)
