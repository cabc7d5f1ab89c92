"""The commands that use what runs made: ask it, put it into use, take it back.

Names, options and help alone, as in `flows.cli`, which they are part of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli_options import ConfigOption, JsonOption, SetOption

use_app = typer.Typer()

AdapterOption = Annotated[
    str,
    typer.Option(
        "--adapter",
        metavar="WHICH",
        help="champion, challenger, previous, a version, a run's id, or a folder.",
    ),
]
ThinkOption = Annotated[
    bool | None,
    typer.Option(
        "--think/--no-think",
        help="Let it reason before it answers, or not; by default as its run was trained.",
    ),
]
ReasonOption = Annotated[
    str, typer.Option("--reason", "-r", metavar="TEXT", help="Why; kept in the history.")
]


@use_app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    adapter: AdapterOption = "champion",
    think: ThinkOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer one question with a fine-tuned model, as it is written."""
    from flows import cli_adapter

    cli_adapter.generate(prompt, adapter, config, settings or [], think=think, as_json=as_json)


@use_app.command()
def chat(
    adapter: AdapterOption = "champion",
    think: ThinkOption = None,
    remember: Annotated[
        bool, typer.Option("--remember", help="Each question with all that was said before it.")
    ] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Ask a fine-tuned model question after question; each is answered on its own."""
    from flows import cli_adapter

    cli_adapter.chat(adapter, config, settings or [], think=think, remember=remember)


@use_app.command()
def export(
    target: Annotated[str, typer.Argument(metavar="DIR", help="New folder, or an earlier export.")],
    adapter: AdapterOption = "champion",
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows",
            metavar="FILE",
            help="Held-out rows (jsonl) to compare on; by default those of the adapter's run.",
            resolve_path=True,
        ),
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option("--max-rows", metavar="N", min=1, help="Most rows to compare on [200]."),
    ] = None,
    max_loss_drift: Annotated[
        float | None,
        typer.Option(
            "--max-loss-drift",
            metavar="NATS",
            min=0,
            help="Largest rise of the answer loss [0.05].",
        ),
    ] = None,
    max_lost_answers: Annotated[
        float | None,
        typer.Option(
            "--max-lost-answers",
            metavar="SHARE",
            min=0,
            max=1,
            help="Largest share of rows that only the adapter gets right [0.03].",
        ),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into its base model, if the result answers like the adapter.

    Writes bfloat16 safetensors, the adapter, commands for vLLM and a Modelfile
    for Ollama. If the answers to held-out rows drift too far, nothing is written.
    """
    from flows import cli_adapter

    limits = {
        "max_rows": max_rows,
        "max_loss_drift": max_loss_drift,
        "max_lost_answers": max_lost_answers,
    }
    cli_adapter.export(target, adapter, rows, limits, config, settings or [], as_json=as_json)


@use_app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A version's number, or 'challenger'.")],
    reason: ReasonOption = "",
    allow_degraded: Annotated[
        bool, typer.Option("--allow-degraded", help="Although its run fell short of the plan.")
    ] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a registered version into use by hand, if its adapter is intact."""
    from flows import cli_history

    cli_history.promote(
        version, reason, config, settings or [], allow_degraded=allow_degraded, as_json=as_json
    )


@use_app.command()
def rollback(
    reason: ReasonOption,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Do not fetch and check the adapter first.")
    ] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put the version into use again that was in use before; no run undoes it."""
    from flows import cli_history

    cli_history.rollback(reason, config, settings or [], verify=not unverified, as_json=as_json)


@use_app.command()
def history(
    config: ConfigOption = None, settings: SetOption = None, as_json: JsonOption = False
) -> None:
    """Show what is in use, and every promotion and rollback: when, what, whose run, who, why."""
    from flows import cli_history

    cli_history.history(config, settings or [], as_json=as_json)
