"""The embedded model before and after fine-tuning, through the whole flow, for three seeds.

    python -m benchmarks.embedded [--seeds 0 1 2] [--out FILE]

Uses deployments/configs/embedded.yaml with another seed, a temporary Prefect server and a separate
MLflow; all questions are asked. Prints exact match by group of questions, and seconds by stage.
Exits with 1 unless the base is right on at most 20 % and every tuned model on at least 85 % of the
test questions. Wordings that no training showed ('novel') are reported but not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT

BASE_AT_MOST = 0.20
TUNED_AT_LEAST = 0.85
NOT_COUNTED = "novel"


def run_once(work: Path, seed: int) -> dict[str, Any]:
    """Run the flow once and return its card."""
    from flows.finetune import run_in_process
    from qwen3ft.config import load_config

    folders = {"runs_dir": work / f"runs-{seed}", "output_dir": work / "out"}
    changes: dict[str, Any] = {name: str(folder) for name, folder in folders.items()}
    changes |= {"cache_dir": str(work / "cache"), "seed": seed, "stop_asking_early": False}
    config = load_config(ROOT / "deployments/configs/embedded.yaml", changes)
    state = run_in_process(config)
    if not state.is_completed():
        sys.exit(f"seed {seed}: {state.name}: {state.message}")
    (card,) = folders["runs_dir"].glob("*/card.json")
    content: dict[str, Any] = json.loads(card.read_text(encoding="utf-8"))
    return content


def overall(card: dict[str, Any]) -> tuple[float, float, int]:
    """Return base and tuned exact match over all counted questions, and their number."""
    groups = {k: v for k, v in card["scores_by_split"].items() if k != NOT_COUNTED}
    rows = sum(count for _, _, count in groups.values())
    base = sum(base * count for base, _, count in groups.values()) / rows
    tuned = sum(tuned * count for _, tuned, count in groups.values()) / rows
    return base, tuned, rows


def main() -> None:
    """Run all seeds, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="qwen3ft-embedded-"))
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{work}/mlruns/mlflow.db"
    os.environ["PREFECT_HOME"] = str(work / "prefect")
    (work / "mlruns").mkdir()
    cards = {seed: run_once(work, seed) for seed in arguments.seeds}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    print(f"\n{date}  {platform.machine()}, {os.cpu_count()} cores")
    groups = sorted(next(iter(cards.values()))["scores_by_split"])
    print("seed  model  " + "  ".join(f"{group:>8}" for group in [*groups, "counted"]))
    passed = True
    for seed, card in cards.items():
        base, tuned, rows = overall(card)
        passed &= base <= BASE_AT_MOST and tuned >= TUNED_AT_LEAST and rows >= 300
        for column, (label, total) in enumerate((("base", base), ("tuned", tuned))):
            cells = [card["scores_by_split"][group][column] for group in groups]
            print(f"{seed:4}  {label:5}  " + "  ".join(f"{x:8.1%}" for x in [*cells, total]))
        seconds = ", ".join(f"{k} {v:.0f}" for k, v in card["seconds_by_stage"].items() if v >= 1)
        print(f"      {rows} counted questions; seconds: {seconds}")
    if arguments.out:
        content = {"date": date, "cpus": os.cpu_count(), "cards": cards}
        arguments.out.write_text(json.dumps(content, indent=2), encoding="utf-8")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
