"""Rows per second of rendering and tokenising, on one core.

    python benchmarks/tokenise.py [--rows 20000] [--tokenizer FOLDER]

Rows are the embedded training questions, repeated with a number in each so that no two texts are
equal, and GSM8K where `../shared/data/gsm8k` exists. Prints tokens a row, rows and tokens a second
(best of three), the peak of resident memory, machine and date; exits with 1 below 5,000 rows a
second on rows of at most 120 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
from benchmarks.machine import ROOT

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
AT_LEAST_ROWS_PER_SECOND = 5000
SHORT_ROW_TOKENS = 120
CHUNK_ROWS = 2000
REPEATS = 3


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def embedded_rows(count: int) -> list[dict[str, Any]]:
    """Rows of about 100 tokens: some embedded questions in one, with their answers."""
    from qwen3ft.embedded import DATA_DIR

    source = read(DATA_DIR / "train.jsonl")
    rows = []
    for number in range(count):
        some = [source[(number * 7 + step) % len(source)] for step in range(5)]
        rows.append(
            {
                "question": f"{number}: " + "\n".join(row["question"] for row in some),
                "answer": f"{number}: " + "\n".join(row["answer"] for row in some),
            }
        )
    return rows


def gsm8k_rows(count: int) -> list[dict[str, Any]]:
    """GSM8K with the reasoning before `####` as such, numbered so that no text occurs twice."""
    source = read(GSM8K)
    rows = []
    for number in range(count):
        row = source[number % len(source)]
        reasoning, _, answer = row["answer"].rpartition("####")
        texts = {"reasoning": f"{number}. {reasoning.strip()}", "answer": answer.strip()}
        rows.append({"question": f"{number}. {row['question'].strip()}", **texts})
    return rows


def measure(name: str, tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> bool:
    """Print one line; whether the bar holds for these rows."""
    from qwen3ft.chat.rendering import tokenize_rows

    seconds, tokens = float("inf"), 0
    for _ in range(REPEATS):
        started, tokens = time.perf_counter(), 0
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = tokenize_rows(tokenizer, rows[start : start + CHUNK_ROWS], **options)
            tokens += sum(len(row.input_ids) for row in chunk)
        seconds = min(seconds, time.perf_counter() - started)
    per_row, per_second = tokens / len(rows), len(rows) / seconds
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name:17} {len(rows):7,} {per_row:8.1f} {per_second:10,.0f} "
        f"{tokens / seconds:12,.0f} {peak_mb:9,.0f}"
    )
    return per_second >= AT_LEAST_ROWS_PER_SECOND or per_row > SHORT_ROW_TOKENS


def main() -> None:
    """All kinds of rows, a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokenizer", default=None, help="a folder; the embedded one by default")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    import tokenizers
    import transformers

    from qwen3ft.chat.rendering import load_tokenizer
    from qwen3ft.embedded import MODEL_DIR

    tokenizer = load_tokenizer(arguments.tokenizer or MODEL_DIR)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    print(
        f"{date}  {platform.machine()}, one of {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, python {platform.python_version()}, "
        f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"
    )
    print("rows                count tok/row     rows/s        tok/s   peak MB")
    held = measure("embedded", tokenizer, embedded_rows(arguments.rows))
    held &= measure("embedded, escaped", tokenizer, embedded_rows(arguments.rows), escape=True)
    if GSM8K.exists():
        held &= measure("GSM8K", tokenizer, gsm8k_rows(arguments.rows))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
