"""The command that serves a fine-tuned model to OpenAI's clients."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli.adapters import enter_project
from flows.cli.options import AdapterOption, ConfigOption, SetOption
from flows.cli.output import say

if TYPE_CHECKING:
    from qwen3ft.server.run import Announcement


class EngineChoice(StrEnum):
    """Programs that `--engine` takes."""

    AUTO = "auto"
    VLLM = "vllm"
    LLAMA_CPP = "llama.cpp"
    OWN = "own"


def serve_command(
    adapter: AdapterOption = "champion",
    engine: Annotated[
        EngineChoice, typer.Option("--engine", help="Program that writes the answers.")
    ] = EngineChoice.AUTO,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; beyond loopback with a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for a free one.")] = 8000,
    key: Annotated[bool, typer.Option("--key", help="Need the key on loopback too.")] = False,
    slots: Annotated[
        int, typer.Option("--slots", min=1, help="Most answers written at a time.")
    ] = 16,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Most requests that wait.")] = 64,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            "--context-tokens",
            min=16,
            help="Most tokens of a prompt and its answer [8192 and the answer].",
        ),
    ] = None,
    probe_rows: Annotated[
        int,
        typer.Option(
            "--probe-rows", min=0, help="Held-out rows to compare with the test; 0 for none."
        ),
    ] = 100,
    canary: Annotated[
        float,
        typer.Option(
            "--canary",
            metavar="SHARE",
            min=0,
            max=0.2,
            help="Share of the requests that a new champion answers first, on trial.",
        ),
    ] = 0.0,
    canary_hours: Annotated[
        float | None,
        typer.Option(
            "--canary-hours",
            metavar="HOURS",
            min=0.01,
            help="Longest trial; then the new champion is used if nothing speaks against it [12].",
        ),
    ] = None,
    log_requests: Annotated[
        Path | None,
        typer.Option(
            "--log-requests",
            metavar="DIR",
            help="Keep questions and answers there, secrets masked, to be corrected.",
            resolve_path=True,
        ),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Serve a fine-tuned model to OpenAI's clients, on loopback; it follows the champion.

    It is ready once it has answered held-out questions as in the test of its run.
    """
    from qwen3ft import logs
    from qwen3ft.machine.gpus import visible_gpus
    from qwen3ft.records.serving import ServeRequest
    from qwen3ft.registry.registry import Registry
    from qwen3ft.registry.task_name import with_task_name
    from qwen3ft.server.choice import EngineMaker
    from qwen3ft.server.follower import Canary
    from qwen3ft.server.run import ModelServer, ServerOptions
    from qwen3ft.server.sources import find_source
    from qwen3ft.tracking.uri import default_tracking_uri

    if canary and adapter != "champion":
        raise typer.BadParameter("only a new champion is put on trial", param_hint="--canary")
    if canary_hours is not None and not canary:
        raise typer.BadParameter("without --canary there is no trial", param_hint="--canary-hours")
    wanted, adapter = enter_project(adapter, config, settings)
    logs.configure()
    registry = Registry(default_tracking_uri())
    source = find_source(wanted, registry, adapter)
    if adapter == "champion":
        wanted = with_task_name(wanted, registry)
    follow = wanted.registered_name if adapter == "champion" else None

    device: Literal["cuda", "cpu"] = "cuda" if visible_gpus() else "cpu"
    request = ServeRequest(
        engine="own",
        config=wanted,
        adapter=str(source.folder),
        device=device,
        socket="",  # the engine's own choice
        slots=slots,
        context_tokens=context_tokens,
    )
    make_engine = EngineMaker(engine.value, request, say)
    trials = Canary(canary) if canary_hours is None else Canary(canary, canary_hours)
    options = ServerOptions(host, port, queue, probe_rows, trials, log_requests, key)
    ModelServer(
        options, wanted, registry, source, make_engine, _announce, follow, make_engine.fall_back
    ).run()


def _announce(ready: Announcement) -> None:
    if ready.made_key is not None:
        say(f"API key, shown this once and kept in {ready.key_file}: {ready.made_key}")
    elif ready.key_file is not None:
        say(f"The API key is in {ready.key_file}.")
    say(f"Ready: {ready.model} at {ready.address}")
