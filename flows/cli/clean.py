"""The command `clean`: remove what old runs left on disk and in the Prefect server's history."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import ConfigOption, JsonOption, SetOption
from flows.cli.output import open_console, print_json, say
from qwen3ft.text.commands import runnable

if TYPE_CHECKING:
    from deployments.stack import Stack


def clean_command(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")
    ] = False,
    keep_days: Annotated[
        float, typer.Option("--keep-days", min=0, help="Keep runs, models and history this young.")
    ] = 30.0,
    keep_runs: Annotated[
        int, typer.Option("--keep-runs", min=0, help="Keep this many of the newest runs.")
    ] = 20,
    abandon: Annotated[
        list[str] | None,
        typer.Option("--abandon", metavar="RUN_ID", help="A failed run that nobody will resume."),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove old checkpoints, runs, quantized models and flow-run history.

    Whatever an adapter in use, a run in progress or a resumable run needs is kept.
    """
    from flows.cli.project import open_project, request_config, use_local_services
    from flows.cli.views.common import show_removals
    from qwen3ft.operations.retention import RetentionPolicy, plan_removals, remove
    from qwen3ft.registry.versions import find_protected
    from qwen3ft.tracking.uri import default_tracking_uri
    from qwen3ft.units import size_text

    policy = RetentionPolicy(keep_days=keep_days, keep_runs=keep_runs, abandon=tuple(abandon or ()))
    stack = open_project()
    wanted = request_config(stack.root, config, settings)
    use_local_services(stack)
    removals = plan_removals(wanted, find_protected(default_tracking_uri()), policy)
    gone = removals if dry_run else remove(removals)
    # last: a long history takes long, and what is in use was looked up before
    flow_runs = _clean_history(stack, keep_days, dry_run=dry_run)
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
    console = open_console()
    show_removals(console, gone, stack.root)
    history = "" if flow_runs is None else f"; {flow_runs} flow run(s) of the server's history"
    verb = "To be removed" if dry_run else "Removed"
    console.print(f"{verb}: {len(gone)} folder(s), {size_text(size_bytes)}{history}.")


def _clean_history(stack: Stack, keep_days: float, *, dry_run: bool) -> int | None:
    """Return how many flow runs were (or would be) removed; None while the server is down."""
    from deployments.prefect_api import count_old, remove_old

    if stack.status().prefect_url is None:
        up = runnable("qwen3ft up")
        say(f"The Prefect server is down; its history stays. To clean it too: {up}")
        return None
    return (count_old if dry_run else remove_old)(stack.layout(), keep_days)
