"""The whole flow on one GPU, with random-init weights of the exact Qwen3-4B shape.

    python -m benchmarks.gpu_flow --work /tmp/gpu_flow --out results.json

Weights do not matter for speed and memory, shapes and lengths do. Two runs of the flow
`qwen3-finetune`, in process, on a temporary Prefect server and MLflow on SQLite:

1. seq 256, batch 4 x 16, budget 13 GB, the spec's other defaults;
2. the same while another process holds most of the GPU, so that less than the budget is free, and
   the run must plan within that or recover from running out of memory.

Prints one table and writes JSON with machine, versions and date. The lengths are lognormal with
median 0.375 x seq and sigma 0.6, clipped to [48, seq].
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine, write_json
from benchmarks.speed.cases import SHAPES
from benchmarks.speed.model import make_random_model

BALLAST = """
import sys, time, torch
leave = int(sys.argv[1])
torch.cuda.init()
free = torch.cuda.mem_get_info()[0]
held = torch.empty(max(0, free - leave), dtype=torch.uint8, device="cuda")
print("held", held.numel(), flush=True)
time.sleep(3600)
"""


def make_rows(path: Path, rows: int, sequence_tokens: int, seed: int = 0) -> None:
    """Write question-answer rows whose rendered lengths follow the workload's distribution."""
    from transformers import AutoTokenizer

    from qwen3ft.embedded import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    generator = random.Random(seed)
    words = sorted(set(_words()))
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            length = generator.lognormvariate(math.log(sequence_tokens * 0.375), 0.6)
            text_tokens = int(min(sequence_tokens - 40, max(16, length - 24)))
            text = " ".join(generator.choice(words) for _ in range(text_tokens))
            ids = tokenizer(text)["input_ids"][:text_tokens]
            cut = max(4, len(ids) // 3)
            row = {
                "question": f"{number} {tokenizer.decode(ids[:cut])}".strip(),
                "answer": tokenizer.decode(ids[cut:]).strip() or "ok",
            }
            stream.write(json.dumps(row) + "\n")


def _words() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8") + __doc__
    return [word.lower() for word in text.split() if word.isascii() and word.isalpha()]


def run_flow(config: Any) -> dict[str, Any]:
    """Run the flow once; return the facts of its card and the peak stored in MLflow."""
    from flows.finetune import run_in_process
    from qwen3ft.tracking.uri import default_tracking_uri

    started = time.monotonic()
    state = run_in_process(config)
    seconds = time.monotonic() - started
    runs = sorted(Path(config.runs_dir).iterdir(), key=lambda path: path.stat().st_mtime)
    result: dict[str, Any] = {
        "state": state.name,
        "message": str(state.message)[:600],
        "seconds": round(seconds, 1),
        "mlflow": mlflow_peak(default_tracking_uri()),
    }
    card = runs[-1] / "card.json"
    if card.exists():
        result["card"] = json.loads(card.read_text(encoding="utf-8"))
        result["card"].pop("prepare_shell", None)  # folders of this machine
    outcomes = sorted(runs[-1].glob("attempts/*/outcome.json"))
    if outcomes:
        result["outcome"] = json.loads(outcomes[-1].read_text(encoding="utf-8"))
    return result


def mlflow_peak(uri: str) -> dict[str, float]:
    """Return the memory metrics of the newest parent run from MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("qwen3-finetune")
    parents = client.search_runs(
        [experiment.experiment_id], "tags.prefect.flow_run_id != ''", max_results=1
    )
    values: dict[str, float] = parents[0].data.metrics
    return {key: value for key, value in values.items() if key.startswith("memory/")}


@contextmanager
def other_tenant(leave_bytes: int) -> Iterator[None]:
    """Run another process that holds all of the GPU's memory but `leave_bytes`."""
    command = [sys.executable, "-c", BALLAST, str(leave_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        print(f"other process: {process.stdout.readline().strip()} bytes", flush=True)
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    """Make both runs, print a table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, 15 GB")
    parser.add_argument("--out", type=Path, required=True, help="JSON with the results")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--leave-gb", type=float, help="free memory left to run 2")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the benchmark")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{work}/mlruns/mlflow.db")
    os.environ.setdefault("PREFECT_HOME", str(work / "prefect"))
    (work / "mlruns").mkdir(exist_ok=True)

    from qwen3ft.config import TrainingConfig

    sizes = SHAPES["4b"]
    if arguments.tiny:
        small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        sizes = {**sizes, **small, "num_attention_heads": 2, "num_key_value_heads": 2}
    started = time.monotonic()
    make_random_model(work / "qwen3-4b-random", sizes, seed=0)
    make_rows(work / "rows.jsonl", rows=64 * arguments.steps, sequence_tokens=256)
    print(f"model and rows made in {time.monotonic() - started:.1f} s", flush=True)
    config = TrainingConfig(
        model_name=str(work / "qwen3-4b-random"),
        output_dir=str(work / "out"),
        runs_dir=str(work / "runs"),
        cache_dir=str(work / "cache"),
        data_paths=(str(work / "rows.jsonl"),),
        held_out_fraction=0.05,
        max_steps=arguments.steps,
        evaluate_every_steps=max(1, arguments.steps // 3),
        inference_rows=16,
        max_new_tokens=32,
    )
    results: dict[str, Any] = {"machine": machine(), "config": config.model_dump(mode="json")}
    results["plain"] = run_flow(config)
    write_json(arguments.out, results)
    peak_gb = results["plain"].get("outcome", {}).get("peak_reserved_gb", 8.0)
    # Room for the context, the weights and two thirds of the first run's other memory.
    leave_gb = arguments.leave_gb or 3.75 + 0.65 * (peak_gb - 3.0)
    with other_tenant(int(leave_gb * 2**30)) if results["machine"]["gpu"] else nullcontext():
        results["squeezed"] = run_flow(config.model_copy(update={"seed": 1}))
    results["squeezed"]["leave_gb"] = leave_gb
    write_json(arguments.out, results)
    report(results)


def report(results: dict[str, Any]) -> None:
    """Print the table."""
    print(f"\n{results['machine']['date']}  {results['machine']['gpu'] or 'CPU'}")
    print(f"{'run':10} {'state':10} {'seconds':>8} {'peak GB':>8} {'tok/s':>7}  attempts")
    for name in ("plain", "squeezed"):
        result = results[name]
        card, outcome = result.get("card", {}), result.get("outcome", {})
        attempts = ", ".join(
            f"{a['outcome']} at {a['micro_batch_size']}x{a['gradient_accumulation_steps']}"
            + (" recomputing" if a["gradient_checkpointing"] else "")
            for a in card.get("attempts", [])
        )
        print(
            f"{name:10} {result['state']:10} {result['seconds']:8.1f} "
            f"{card.get('peak_memory_gb', float('nan')):8.2f} "
            f"{outcome.get('tokens_per_second', float('nan')):7.0f}  {attempts}"
        )
        print(f"{'':10} in MLflow: {result['mlflow']}")


if __name__ == "__main__":
    main()
