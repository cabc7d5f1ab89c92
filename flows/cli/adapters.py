"""The commands that use a fine-tuned model: generate, chat and export. It runs in a worker."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.options import (
    AdapterOption,
    ConfigOption,
    JsonOption,
    SetOption,
    ThinkOption,
)
from flows.cli.output import AnswerPrinter, open_console, print_json, say

if TYPE_CHECKING:
    from qwen3ft.config import TrainingConfig
    from qwen3ft.serving.session import ChatSession


def generate_command(
    prompt: Annotated[str, typer.Argument(help="The question.")],
    adapter: AdapterOption = "champion",
    think: ThinkOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer one question with a fine-tuned model, printed as it is written."""
    chosen = requested_adapter(adapter, config, settings)
    with chosen.open_session(think) as session:
        answer = _relay(session, [_user(prompt)], quiet=as_json)
    if as_json:
        print_json({"prompt": prompt, **answer, "adapter": str(chosen.folder)})


def chat_command(
    adapter: AdapterOption = "champion",
    think: ThinkOption = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Answer each question on its own.")
    ] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Talk with a fine-tuned model, which remembers the conversation."""
    chosen = requested_adapter(adapter, config, settings)
    with chosen.open_session(think) as session:
        session.wait_until_ready()
        say(f"{chosen.folder}\nType a question; an empty line ends the chat.")
        if not forget:
            say("It remembers the conversation; /new begins another one.")
        messages: list[dict[str, Any]] = []
        while question := _read_line():
            if question == "/new":
                messages = []
                continue
            messages = [_user(question)] if forget else [*messages, _user(question)]
            answer = _relay(session, messages, quiet=False)
            messages.append({"role": "assistant", "content": answer["answer"]})


def export_command(
    target: Annotated[str, typer.Argument(metavar="DIR", help="New folder, or an earlier export.")],
    adapter: AdapterOption = "champion",
    form: Annotated[
        Literal["safetensors", "gguf"] | None,
        typer.Option("--format", help="gguf adds files for llama.cpp and Ollama [safetensors]."),
    ] = None,
    quantize: Annotated[
        Literal["q8_0", "q4_k_m"] | None,
        typer.Option("--quantize", help="Write GGUF with weights of this type [bfloat16]."),
    ] = None,
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

    Writes bfloat16 safetensors, the adapter and commands for servers; with
    --format gguf also files for llama.cpp, and a Modelfile for Ollama. If the
    answers to held-out rows drift too far, nothing is written.
    """
    from flows.cli.views.common import show_export
    from qwen3ft.records.requests import ExportLimits
    from qwen3ft.serving.export import export_adapter, find_held_out

    folder = Path(target).resolve()  # before the working folder changes
    if quantize is not None and form == "safetensors":
        raise typer.BadParameter(
            "safetensors are written in bfloat16; servers quantise them when they load.",
            param_hint="--quantize",
        )
    chosen = requested_adapter(adapter, config, settings)
    given = {
        "max_rows": max_rows,
        "max_loss_drift": max_loss_drift,
        "max_lost_answers": max_lost_answers,
    }
    limits = ExportLimits.model_validate({k: v for k, v in given.items() if v is not None})
    held_out = rows or find_held_out(chosen.config, chosen.folder)
    with _gpu_lock(chosen):
        report = export_adapter(
            chosen.config,
            chosen.folder,
            folder,
            held_out,
            chosen.device,
            limits,
            gguf=quantize or ("bf16" if form == "gguf" else None),
        )
    if as_json:
        print_json({"folder": str(folder), "parity": report.model_dump(mode="json")})
    else:
        show_export(open_console(), folder, report)


@dataclass(frozen=True)
class ChosenAdapter:
    """An adapter that was found and verified, and the device to run it on."""

    config: TrainingConfig
    folder: Path
    device: Literal["cuda", "cpu"]
    said: frozenset[str] = frozenset()
    """Settings that the request itself names."""

    def open_session(self, think: bool | None) -> ChatSession:
        """Load it in a worker, asked as in its own run.

        `think` overrides whether it thinks; limits of answers that the request names stay.
        """
        from qwen3ft.model.saved_adapter import read_provenance, was_trained_to_think
        from qwen3ft.records.provenance import ANSWER_LIMITS
        from qwen3ft.records.requests import AskRequest
        from qwen3ft.serving.prompting import with_settings_of_the_run
        from qwen3ft.serving.session import ChatSession

        provenance = read_provenance(self.folder)
        limits = self.said.intersection(ANSWER_LIMITS)
        request = AskRequest(
            config=with_settings_of_the_run(self.config, provenance, but=limits),
            adapter=str(self.folder),
            device=self.device,
            thinking=was_trained_to_think(provenance) if think is None else think,
        )
        return ChatSession(request)


def requested_adapter(
    adapter: str, config: Path | None, settings: list[str] | None
) -> ChosenAdapter:
    """Return the adapter that the options of a command name, in the project of the working folder.

    Raises:
        FinetuneError: there is none, or it is damaged.
    """
    wanted, adapter = enter_project(adapter, config, settings)
    typed = {setting.partition("=")[0].strip() for setting in settings or ()}
    said = wanted.model_fields_set if config else typed  # without a file, others are the project's
    return choose_adapter(wanted, adapter, said)


def enter_project(
    adapter: str, config: Path | None, settings: list[str] | None
) -> tuple[TrainingConfig, str]:
    """Work in the project folder from now on; return the settings and the adapter's name there."""
    from flows.cli.project import open_project, request_config, use_local_services

    adapter = from_here(adapter)
    stack = open_project()
    wanted = request_config(stack.root, config, settings)
    use_local_services(stack)
    return wanted, adapter


def from_here(adapter: str) -> str:
    """Return an adapter that is a folder as a path that holds when the working folder changes."""
    from qwen3ft.model.saved_adapter import has_provenance

    here = Path(adapter)
    is_folder = os.path.isdir(here)  # noqa: PTH112  False for a name that is no path
    return (
        str(here.resolve()) if is_folder and ("/" in adapter or has_provenance(here)) else adapter
    )


def choose_adapter(config: TrainingConfig, adapter: str, said: Iterable[str] = ()) -> ChosenAdapter:
    """Return the adapter of that name, number, run or folder, to be run on this machine.

    Args:
        config: All settings.
        adapter: Its name.
        said: Settings that the request itself names.

    Raises:
        FinetuneError: there is none, or it is damaged.
    """
    from qwen3ft.machine.gpus import visible_gpus
    from qwen3ft.registry.lookup import find_adapter
    from qwen3ft.registry.registry import Registry
    from qwen3ft.tracking.uri import default_tracking_uri

    folder = find_adapter(config, Registry(default_tracking_uri()), adapter)
    device: Literal["cuda", "cpu"] = "cuda" if visible_gpus() else "cpu"
    return ChosenAdapter(config, folder.resolve(), device, frozenset(said))


def _gpu_lock(chosen: ChosenAdapter) -> AbstractContextManager[None]:
    """Return the lock that an export takes on the GPU, as a run does."""
    from qwen3ft.machine.gpu_lock import CPU, hold_gpu
    from qwen3ft.machine.gpus import visible_gpus

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
    """Print an answer as it is written, its thinking on standard error; return all of it."""
    texts, printer = {"thinking": "", "answer": ""}, AnswerPrinter()
    stopped = True
    for chunk in session.ask(messages):
        if chunk.kind == "end":
            stopped = chunk.stopped
        else:
            if not quiet and chunk.kind == "answer" and texts["thinking"] and not texts["answer"]:
                printer.end()
                typer.echo(err=True)
            texts[chunk.kind] += chunk.text
            if not quiet:
                printer.add(chunk.text, err=chunk.kind == "thinking")
    if not quiet:
        printer.end()
        typer.echo()
        if not stopped:
            say("(cut off at max_new_tokens)")
    return {**texts, "stopped": stopped}


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
