"""The commands that use a fine-tuned model: generate, chat and export. It runs in a worker."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from flows.cli_project import open_project, request_config, use_local_services
from flows.cli_view import open_console, print_json, say
from qwen3ft.config import TrainingConfig
from qwen3ft.machine.gpu_lock import CPU, hold_gpu
from qwen3ft.machine.gpus import visible_gpus
from qwen3ft.model.saved_adapter import has_provenance, read_provenance, was_trained_to_think
from qwen3ft.records.requests import AskRequest, ExportLimits, ParityReport
from qwen3ft.registry.lookup import find_adapter
from qwen3ft.serving.session import ChatSession
from qwen3ft.tracking.connection import default_tracking_uri


@dataclass(frozen=True)
class Chosen:
    """The adapter that was asked for, and how this machine runs it."""

    config: TrainingConfig
    folder: Path
    device: Literal["cuda", "cpu"]

    def ask_request(self, think: bool | None) -> AskRequest:
        """How the model is asked: as its own run was, unless `think` says otherwise."""
        card = read_provenance(self.folder)
        theirs = card["config"]
        kept = ("special_tokens_in_text", "reasoning_separator")
        update = {name: theirs[name] for name in kept if name in theirs}
        config = self.config.model_copy(update=update)
        thinking = was_trained_to_think(card) if think is None else think
        return AskRequest(
            config=config, adapter=str(self.folder), device=self.device, thinking=thinking
        )


def generate(
    prompt: str,
    adapter: str,
    path: Path | None,
    settings: list[str],
    *,
    think: bool | None,
    as_json: bool,
) -> None:
    """Print the answer to one question as it is written."""
    chosen = _choose(adapter, path, settings)
    with ChatSession(chosen.ask_request(think)) as session:
        answer = _relay(session, [_user(prompt)], quiet=as_json)
    if as_json:
        print_json({"prompt": prompt, **answer, "adapter": str(chosen.folder)})


def chat(
    adapter: str, path: Path | None, settings: list[str], *, think: bool | None, remember: bool
) -> None:
    """Answer line after line, until an empty one or the end of input."""
    chosen = _choose(adapter, path, settings)
    with ChatSession(chosen.ask_request(think)) as session:
        session.wait_until_ready()
        say(f"{chosen.folder}\nAsk; an empty line ends.")
        messages: list[dict[str, Any]] = []
        while question := _read_line():
            messages = [*messages, _user(question)] if remember else [_user(question)]
            answer = _relay(session, messages, quiet=False)
            messages.append({"role": "assistant", "content": answer["answer"]})


def export(
    target: str,
    adapter: str,
    rows: Path | None,
    limits: dict[str, float | None],
    path: Path | None,
    settings: list[str],
    *,
    as_json: bool,
) -> None:
    """Merge the adapter into its base as a folder to serve from."""
    folder = Path(target).resolve()  # before the working folder changes
    chosen = _choose(adapter, path, settings)
    from qwen3ft.serving.export import export_adapter, find_held_out

    held_out = rows or find_held_out(chosen.config, chosen.folder)
    with _card_held(chosen):
        report = export_adapter(
            chosen.config,
            chosen.folder,
            folder,
            held_out,
            chosen.device,
            ExportLimits.model_validate({k: v for k, v in limits.items() if v is not None}),
        )
    if as_json:
        print_json({"folder": str(folder), "parity": report.model_dump(mode="json")})
    else:
        _show_export(folder, report)


def _choose(adapter: str, path: Path | None, settings: list[str]) -> Chosen:
    """Find and verify the adapter."""
    here = Path(adapter)
    if here.is_dir() and ("/" in adapter or has_provenance(here)):
        adapter = str(here.resolve())  # before the working folder changes
    stack = open_project()
    config = request_config(stack.root, path, settings)
    use_local_services(stack)
    from qwen3ft.registry.registry import Registry

    folder = find_adapter(config, Registry(default_tracking_uri()), adapter)
    return Chosen(config, folder.resolve(), "cuda" if visible_gpus() else "cpu")


def _card_held(chosen: Chosen) -> AbstractContextManager[None]:
    """The card for the export alone, as runs have it."""
    config, gpus = chosen.config, visible_gpus()
    if not gpus and not config.lock_cpu:
        return nullcontext()
    return hold_gpu(
        gpus[0].uuid if gpus else CPU,
        f"export of {chosen.folder.name}",
        when_busy=config.when_gpu_is_busy,
        wait_seconds=config.wait_for_gpu_seconds,
    )


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _relay(session: ChatSession, messages: list[dict[str, Any]], *, quiet: bool) -> dict[str, Any]:
    """Show an answer as it is written, the thinking on standard error; gives all of it."""
    texts = {"thinking": "", "answer": ""}
    stopped = True
    for piece in session.ask(messages):
        if piece.kind == "end":
            stopped = piece.stopped
        else:
            if not quiet and piece.kind == "answer" and texts["thinking"] and not texts["answer"]:
                typer.echo(err=True)
            texts[piece.kind] += piece.text
            if not quiet:
                typer.echo(piece.text, nl=False, err=piece.kind == "thinking")
    if not quiet:
        typer.echo()
        if not stopped:
            say("(cut off at max_new_tokens)")
    return {**texts, "stopped": stopped}


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _show_export(folder: Path, report: ParityReport) -> None:
    console = open_console()
    console.print(f"{folder}: compared on {report.rows} held-out rows", soft_wrap=True)
    for score in report.scores:
        console.print(
            f"  {score.form:16}  exact match {score.exact_match:6.1%}  answer loss "
            f"{score.answer_loss:.4f} ({score.loss_drift:+.4f})  same answers "
            f"{score.same_answers:.1%}  lost {score.lost_answers:.1%}",
            soft_wrap=True,
        )
    console.print(f"How to serve it: {folder / 'SERVING.md'}", soft_wrap=True)
