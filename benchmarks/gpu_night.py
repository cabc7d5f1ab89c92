"""A whole night on one GPU, by stage: random-init weights of an exact Qwen3 shape.

    python -m benchmarks.gpu_night --work DIR --out FILE [--shape 4b] [--new-tokens 256] [--drawn]

2,000 rows of up to 256 tokens, 3 epochs of 4 x 16, preflight, 600 questions for base, candidate and
champion, gate, card, within 13 GB; in process, on a temporary Prefect server and MLflow on SQLite.
The champion is an adapter of one step that a short run before has saved and that is put into use
by hand; that run fills the cache of the quantised model, and knows no answer of the second.

Weights do not matter for speed and memory. A random model ends hardly any answer by itself, so
nearly all take `--new-tokens`: longer than real ones. With `--drawn` they end at lengths drawn from
the lognormal distribution of `benchmarks.answers`. All questions are asked unless `--early`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.answers import drawn_worker
from benchmarks.gpu_flow import make_rows, run_flow
from benchmarks.machine import ROOT, machine, write_json
from benchmarks.speed.cases import SHAPES
from benchmarks.speed.model import make_random_model
from qwen3ft.jobs import processes

TRAIN_ROWS, DEV_ROWS, QUESTIONS = 2000, 64, 600
TINY = {"train": 48, "dev": 8, "test": 12}
NAME = "gpu-night"

SHORT_RUN: dict[str, Any] = {
    "max_steps": 1,
    "inference_rows": 1,
    "max_new_tokens": 1,
    "preflight": "off",
    "seed": 1,
}
"""Settings of the run before: it is short, and its answers are of no use to the night."""


def main() -> None:
    """Make the model and the rows, run both nights, print the stages of the second."""
    arguments = _arguments()
    work = arguments.work.resolve()
    (work / "mlruns").mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{work}/mlruns/mlflow.db")
    os.environ.setdefault("PREFECT_HOME", str(work / "prefect"))
    shape = SHAPES[arguments.shape]
    counts = {"train": TRAIN_ROWS, "dev": DEV_ROWS, "test": QUESTIONS}
    if arguments.tiny:
        small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        shape = {**shape, **small, "num_attention_heads": 4, "num_key_value_heads": 2}
        counts = TINY
    model = work / f"qwen3-{arguments.shape}-random"
    started = time.monotonic()
    make_random_model(model, shape, seed=0)
    for seed, (split, rows) in enumerate(counts.items()):
        make_rows(work / f"{split}.jsonl", rows, sequence_tokens=256, seed=seed)
    print(f"model and rows made in {time.monotonic() - started:.1f} s", flush=True)
    if arguments.drawn:
        _end_at_drawn_lengths()
    settings = _settings(arguments, work, model)
    before = run_flow(settings.model_copy(update=SHORT_RUN))
    print(f"the run before: {before['state']} in {before['seconds']:.0f} s", flush=True)
    _put_into_use()
    night = run_flow(settings)
    results = {
        "machine": machine(),
        "config": settings.model_dump(mode="json"),
        "answer_lengths": "drawn" if arguments.drawn else "the model's own",
        "before": before,
        "night": night,
        "inference": _newest_report(Path(settings.runs_dir)),
    }
    write_json(arguments.out, results)
    report(results)


def _end_at_drawn_lengths() -> None:
    """Have the workers of this process end answers at drawn lengths."""
    processes.WORKER_MODULE = drawn_worker.__name__
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def _settings(arguments: argparse.Namespace, work: Path, model: Path) -> Any:
    from qwen3ft.config import TrainingConfig

    return TrainingConfig(
        model_name=str(model),
        name=NAME,
        output_dir=str(work / "out"),
        runs_dir=str(work / "runs"),
        cache_dir=str(work / "cache"),
        data_paths=(str(work / "train.jsonl"),),
        dev_paths=(str(work / "dev.jsonl"),),
        test_paths=(str(work / "test.jsonl"),),
        max_memory_gb=arguments.budget,
        num_epochs=1 if arguments.tiny else 3,
        early_stopping_patience=100,
        max_new_tokens=arguments.new_tokens,
        inference_rows=QUESTIONS,
        stop_asking_early=arguments.early,
        kernels="fused" if arguments.tiny else "auto",
    )


def _put_into_use() -> None:
    """Make the newest version the champion."""
    from qwen3ft.registry.registry import Registry
    from qwen3ft.tracking.uri import default_tracking_uri

    Registry(default_tracking_uri()).promote(NAME, "1", None)


def _newest_report(runs: Path) -> dict[str, Any]:
    """Return the inference report of the newest run, without answers."""
    paths = sorted(runs.glob("*/jobs/inference/outcome.json"), key=lambda p: p.stat().st_mtime)
    if not paths:
        return {}
    found: dict[str, Any] = json.loads(paths[-1].read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name != "samples"}


def report(results: dict[str, Any]) -> None:
    """Print the stages of the night."""
    night, found = results["night"], results["inference"]
    card, outcome = night.get("card", {}), night.get("outcome", {})
    print(f"\n{results['machine']['date']}  {results['machine']['gpu'] or 'CPU'}")
    for stage, seconds in card.get("seconds_by_stage", {}).items():
        print(f"  {stage:12}{seconds:8.1f} s")
    print(f"  {'start to end':12}{night['seconds']:8.1f} s  {night['state']}: {night['message']}")
    print(f"  training: {outcome.get('tokens_per_second', math.nan):,.0f} tokens/s")
    print(f"  peak: {card.get('peak_memory_gb', math.nan):.2f} of {card.get('budget_gb')} GB")
    print(f"  answers by {card.get('answered_by')}")
    seconds = [found.get(name) or math.nan for name in ("answer_seconds", "predicted_seconds")]
    print("  answering: {:.1f} s, {:.1f} predicted once lengths were known".format(*seconds))
    print(f"  asked: {found.get('generated')} of {found.get('questions_planned')} each")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, 15 GB")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="4b", choices=sorted(SHAPES))
    parser.add_argument("--budget", type=float, default=13.0, metavar="GB")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--drawn", action="store_true", help="end answers at drawn lengths")
    parser.add_argument("--early", action="store_true", help="let asking stop early")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the benchmark")
    return parser.parse_args()


if __name__ == "__main__":
    main()
