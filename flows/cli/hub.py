"""`qwen3ft push`: an adapter goes to the hub of Hugging Face."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.options import AdapterOption, ConfigOption, JsonOption, SetOption
from flows.cli.output import print_json, say

if TYPE_CHECKING:
    from flows.cli.adapters import ChosenAdapter
    from qwen3ft.records.evaluation import ModelScore


def push_command(
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub.")],
    adapter: AdapterOption = "champion",
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody read it; otherwise it is private.")
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="By default that of the base model on the hub."
        ),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload an adapter to the hub of Hugging Face.

    It comes with a card: scores, a summary of the data, licence, base model and
    its revision. No row, and no path of this machine, is uploaded.
    """
    from flows.cli.adapters import requested_adapter
    from qwen3ft.serving.hub_push import push_adapter

    chosen = requested_adapter(adapter, config, settings)
    scores = _scores_of(chosen)
    url = push_adapter(chosen.folder, name, scores, licence=licence, private=not public)
    if as_json:
        print_json({"repository": name, "commit": url, "adapter": str(chosen.folder)})
        return
    if not scores:
        say("The card states no scores: no card of its run can be read, here or in MLflow.")
    say(url)


def _scores_of(chosen: ChosenAdapter) -> list[ModelScore]:
    """Return the results in the card of the adapter's run, on this machine or in MLflow."""
    from pydantic import TypeAdapter

    from qwen3ft.disk.files import read_foreign_json
    from qwen3ft.logs import get_logger
    from qwen3ft.model.saved_adapter import read_provenance
    from qwen3ft.records.evaluation import ModelScore
    from qwen3ft.registry.registry import Registry
    from qwen3ft.registry.task_name import with_task_name
    from qwen3ft.tracking.uri import default_tracking_uri

    run = str(read_provenance(chosen.folder)["run_id"])
    with tempfile.TemporaryDirectory(prefix="qwen3ft-") as folder:
        card: Path | None = Path(chosen.config.runs_dir) / run / "card.json"
        if card is not None and not card.is_file():
            registry = Registry(default_tracking_uri())
            model = with_task_name(chosen.config, registry).registered_name
            card = registry.run_card(model, run, Path(folder))
        if card is None:
            return []
        try:
            found = TypeAdapter(dict[str, Any]).validate_python(read_foreign_json(card))
            return TypeAdapter(list[ModelScore]).validate_python(found.get("scores") or [])
        except (OSError, ValueError) as error:  # of another version, or cut off
            get_logger("hub_push").warning("the card of run %s cannot be read: %s", run, error)
            return []
