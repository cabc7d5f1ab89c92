"""The champion that clients ask: a run of the embedded model, registered, promoted, exported."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from qwen3ft.chat.thinking import split_thinking
from qwen3ft.disk.files import read_json_lines
from qwen3ft.embedded import DATA_DIR
from qwen3ft.evaluation.answers import exact_match
from qwen3ft.model.saved_adapter import read_provenance

REGISTERED_NAME = "qwen3ft-embedded"


@dataclass(frozen=True)
class Champion:
    """A promoted adapter, its export, and questions that the product answers right."""

    adapter: Path
    export: Path
    tracking_uri: str
    provenance: dict[str, Any]
    questions: list[str]
    answers: list[str]


def make_champion(work: Path, count: int, *, thinking: bool = False) -> Champion:
    """Train, promote and export below `work`; what is there already is used again.

    With `thinking`, each row has a sentence of reasoning before its answer. The flow runs in this
    process, with its own MLflow.
    """
    uri = f"sqlite:///{work}/mlruns/mlflow.db"
    os.environ["MLFLOW_TRACKING_URI"] = uri
    os.environ["PREFECT_HOME"] = str(work / "prefect")
    (work / "mlruns").mkdir(parents=True, exist_ok=True)
    if not (cards := list(work.glob("runs/*/card.json"))):
        _train(work, thinking)
        cards = list(work.glob("runs/*/card.json"))
    run = cards[0].parent
    adapter, export = work / "out" / run.name, work / "export"
    questions, answers = _right_answers(run / "jobs" / "inference" / "answers.jsonl", count)
    if not (export / "manifest.json").is_file():
        _export(work, adapter, export)
    return Champion(adapter, export, uri, read_provenance(adapter), questions, answers)


def settings_of(work: Path) -> dict[str, Any]:
    """Return the settings of the run below `work`, besides those of the embedded model."""
    folders = {"runs_dir": "runs", "output_dir": "out", "cache_dir": "cache"}
    return {
        "name": REGISTERED_NAME,
        **{setting: str(work / name) for setting, name in folders.items()},
    }


def _train(work: Path, thinking: bool) -> None:
    from flows.finetune import run_in_process
    from qwen3ft.config import load_config

    settings = settings_of(work) | (_reasoning_rows(work / "data") if thinking else {})
    config = load_config(ROOT / "deployments/configs/embedded.yaml", settings)
    state = run_in_process(config)
    if state.name != "Promoted":
        raise SystemExit(f"no champion: {state.name}: {state.message}")


def _reasoning_rows(folder: Path) -> dict[str, Any]:
    """Write the embedded model's rows, with reasoning; return the settings that train on them."""
    folder.mkdir(exist_ok=True)
    for path in DATA_DIR.glob("*.jsonl"):
        rows = read_json_lines(path)
        lines = [json.dumps({**row, "reasoning": f"It is {row['answer']}."}) for row in rows]
        (folder / path.name).write_text("\n".join(lines), encoding="utf-8")
    paths = {f"{name}_paths": [str(folder / f"{name}.jsonl")] for name in ("dev", "test")}
    return {**paths, "data_paths": [str(folder / "train.jsonl")], "max_thinking_tokens": 48}


def _export(work: Path, adapter: Path, export: Path) -> None:
    from qwen3ft.config import parse_config
    from qwen3ft.serving.export import export_adapter, find_held_out

    config = parse_config(settings_of(work))
    export_adapter(config, adapter, export, find_held_out(config, adapter), "cpu", gguf="bf16")


def _right_answers(path: Path, count: int) -> tuple[list[str], list[str]]:
    """Return `count` questions, spread over the file, that the candidate answered right."""
    rows = [row for row in read_json_lines(path) if exact_match(row["candidate"], row["reference"])]
    chosen: Sequence[dict[str, Any]] = [rows[at * len(rows) // count] for at in range(count)]
    answers = [split_thinking(row["candidate"])[1] for row in chosen]
    return [row["question"] for row in chosen], answers
