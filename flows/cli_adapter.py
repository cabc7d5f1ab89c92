"""The commands that ask a fine-tuned model: generate and chat. The model runs in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from flows.cli_project import open_project, request_config, use_local_services
from flows.cli_view import print_json, say
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import ModelNotFoundError

CHAMPION = "champion"


def generate(
    prompt: str, adapter: str, path: Path | None, settings: list[str], *, as_json: bool
) -> None:
    """Print the answer to one question."""
    folder, answer = _load(adapter, path, settings)
    text = answer(prompt)
    if as_json:
        print_json({"prompt": prompt, "answer": text, "adapter": folder})
    else:
        typer.echo(text)


def chat(adapter: str, path: Path | None, settings: list[str]) -> None:
    """Answer line after line, until an empty one or the end of input."""
    folder, answer = _load(adapter, path, settings)
    say(f"{folder}\nAsk; an empty line ends.")
    while question := _read_line():
        typer.echo(answer(question))


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _load(adapter: str, path: Path | None, settings: list[str]) -> tuple[str, Callable[[str], str]]:
    """The adapter's folder, and a function that answers with it."""
    if adapter != CHAMPION:
        adapter = str(Path(adapter).resolve())  # before the working folder changes
    stack = open_project()
    config = request_config(stack.root, path, settings)
    use_local_services(stack)
    from qwen3ft.inference import InferenceTester

    folder = _fetch_champion(config) if adapter == CHAMPION else adapter
    tester = InferenceTester(config)
    model, tokenizer = tester.load_finetuned_model(folder)
    return folder, lambda prompt: tester.test_inference(model, tokenizer, prompt)


def _fetch_champion(config: TrainingConfig) -> str:
    from qwen3ft.registry import Registry, registered_model_name
    from qwen3ft.tracking_uri import default_tracking_uri

    registry = Registry(default_tracking_uri())
    name = config.registered_model or registered_model_name(config.model_name)
    champion = registry.champion(name)
    if champion is None:
        raise ModelNotFoundError(
            f"No adapter of {name} has been promoted yet.",
            why="The first run that beats the base model makes a champion.",
            next_command="qwen3ft run",
            registered_model=name,
        )
    target = Path(config.cache_dir) / "champions" / f"{name}-{champion.version}"
    return str(registry.download(champion, target))
