"""Speed of parts of the data stage, in one process on one core.

    python -m benchmarks.data dedup [--rows 200000] [--out FILE]
    python -m benchmarks.data tokenise [--rows 20000] [--out FILE]
    python -m benchmarks.data scan [--rows 20000] [--out FILE]

- dedup: times keys, repeats and near-duplicates on rows of 60 words. One in fifty is held out, one
  in twenty repeats an earlier row, and one in twenty is an earlier row with one word exchanged.
- tokenise: times rendering and tokenising of the embedded questions, numbered so that no two texts
  are equal, and of GSM8K if `shared/data/gsm8k` exists here or beside the checkout.
- scan: times the search for credentials and personal data in clean texts of 300 characters, English
  and Chinese, with years and small numbers.

Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

# Read once by the libraries, when they start their threads.
os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")

from benchmarks.machine import ROOT, report
from qwen3ft.units import MIB

Result = tuple[dict[str, Any], dict[str, bool]]
"""Measured numbers, and whether each bar holds."""

DEFAULT_ROWS = {"dedup": 200_000, "tokenise": 20_000, "scan": 20_000}
TOKENISED_ROWS_PER_SECOND, SHORT_ROW_TOKENS = 5000, 120
"""Bar for tokenising, and the row length up to which it counts."""

CHUNK_ROWS, REPEATS = 2000, 3
CLEAN = (
    "the committee met in 1998, and (as the minutes say) agreed on 12.5 % for his well-kept lawn; ",
    "会议于2019年召开，大家同意把价格提高12.5%，并在3月之前完成全部工作；参加的人有四十七位，",
)
SCANNED_ROWS_PER_SECOND = 60_000
GSM8K = [folder / "shared/data/gsm8k/train.jsonl" for folder in (ROOT, ROOT.parent)]


def peak_bytes() -> int:
    """Return the peak of resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def dedup_row(number: int, words: list[str]) -> tuple[str, str]:
    """Return question and answer of a row; a number always gives the same row."""
    kind, source = number % 20, number
    if kind in (18, 19):
        source = number - 10 - kind % 2
    chosen = random.Random(source).choices(words, k=60)
    if kind == 19:
        chosen[10] = "exchanged"
    return " ".join(chosen[:25]).capitalize() + "?", " ".join(chosen[25:]).capitalize() + "."


def measure_dedup(rows: int, _arguments: argparse.Namespace) -> Result:
    """Time each pass over the rows, and count the planted copies that were found."""
    from qwen3ft.data import splits
    from qwen3ft.data.near_duplicates import NearDuplicates, band_hashes
    from qwen3ft.data.text_features import as_text

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(random.Random(i).choices(letters, k=2 + i % 8)) for i in range(20_000)]
    base_bytes = peak_bytes()
    seconds = dict.fromkeys(("keys", "signatures", "repeats", "pairs"), 0.0)
    builder, near = splits.KeysBuilder(), NearDuplicates()
    for start in range(0, rows, CHUNK_ROWS):
        # Rows are made anew whenever they are needed, so the peak is that of the passes.
        part = [dedup_row(i, words) for i in range(start, min(start + CHUNK_ROWS, rows))]
        started = time.perf_counter()
        for question, answer in part:
            builder.append(
                splits.question_key(question), splits.content_key(question, answer), "train", 0
            )
        keyed = time.perf_counter()
        near.add(band_hashes([as_text(*row) for row in part]))
        seconds["keys"] += keyed - started
        seconds["signatures"] += time.perf_counter() - keyed

    started = time.perf_counter()
    keys = builder.build()
    reasons = splits.find_repeats(keys)
    kept = reasons == splits.KEPT
    roles = splits.hold_out(keys, kept, 0.02, ["test"])
    kept &= ~splits.leaks(keys, roles, kept)
    seconds["repeats"] = time.perf_counter() - started

    making = 0.0

    def text_of(row: int) -> str:
        nonlocal making
        began = time.perf_counter()
        text = as_text(*dedup_row(row, words))
        making += time.perf_counter() - began
        return text

    started = time.perf_counter()
    training = kept & (roles == splits.TRAIN)
    leaked = near.find(training, kept & (roles != splits.TRAIN), text_of)
    training[leaked] = False
    repeated = near.find(training, training, text_of)
    seconds["pairs"] = time.perf_counter() - started - making
    found = {
        "duplicates": int((reasons == splits.DUPLICATE).sum()),
        "near": len(leaked) + len(repeated),
    }
    planted = dict.fromkeys(found, rows // 20)
    result = {
        "rows": rows,
        **{f"{name}_rows_per_second": round(rows / taken) for name, taken in seconds.items()},
        "all_rows_per_second": round(rows / sum(seconds.values())),
        "peak_extra_mb": round((peak_bytes() - base_bytes) / 1e6),
        "planted": planted,
        "found": found | {"verified": near.verified, "capped_buckets": near.capped_buckets},
    }
    return result, {
        "every planted repeat found": found["duplicates"] >= planted["duplicates"],
        "99 % of planted near-copies found": found["near"] >= 0.99 * planted["near"],
    }


def read_json_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def embedded_rows(count: int) -> list[dict[str, Any]]:
    """Return rows of about 100 tokens, each of five embedded questions with their answers."""
    from qwen3ft.embedded import DATA_DIR

    source = read_json_rows(DATA_DIR / "train.jsonl")
    rows = []
    for number in range(count):
        some = [source[(number * 7 + step) % len(source)] for step in range(5)]
        texts = {key: "\n".join(row[key] for row in some) for key in ("question", "answer")}
        rows.append({key: f"{number}: {text}" for key, text in texts.items()})
    return rows


def gsm8k_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Return numbered rows of GSM8K, with the text before `####` as reasoning."""
    source = read_json_rows(path)
    rows = []
    for number, row in zip(range(count), itertools.cycle(source), strict=False):
        reasoning, _, answer = row["answer"].rpartition("####")
        texts = {"question": row["question"], "reasoning": reasoning}
        numbered = {key: f"{number}. {text.strip()}" for key, text in texts.items()}
        rows.append({**numbered, "answer": answer.strip()})
    return rows


def measure_tokenise(rows: int, _arguments: argparse.Namespace) -> Result:
    """Time each kind of rows, best of three."""
    from qwen3ft.chat.rendering import tokenize_rows
    from qwen3ft.chat.tokenizer import load_tokenizer
    from qwen3ft.embedded import MODEL_DIR

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokenizer = load_tokenizer(MODEL_DIR)
    kinds = {"embedded": embedded_rows(rows)}
    if path := next((path for path in GSM8K if path.exists()), None):
        kinds["GSM8K"] = gsm8k_rows(path, rows)
    result: dict[str, Any] = {"rows": rows}
    bars = {}
    for kind, texts in kinds.items():
        seconds, tokens = float("inf"), 0
        for _ in range(REPEATS):
            started, tokens = time.perf_counter(), 0
            for start in range(0, rows, CHUNK_ROWS):
                chunk = tokenize_rows(tokenizer, texts[start : start + CHUNK_ROWS])
                tokens += sum(len(row.input_ids) for row in chunk)
            seconds = min(seconds, time.perf_counter() - started)
        result[kind] = {
            "rows_per_second": round(rows / seconds),
            "tokens_per_second": round(tokens / seconds),
            "tokens_per_row": round(tokens / rows, 1),
            "peak_mb": round(peak_bytes() / MIB),
        }
        if tokens / rows <= SHORT_ROW_TOKENS:
            bar = f"{kind} >= {TOKENISED_ROWS_PER_SECOND:,} rows/s"
            bars[bar] = rows / seconds >= TOKENISED_ROWS_PER_SECOND
    return result, bars


def measure_scan(rows: int, _arguments: argparse.Namespace) -> Result:
    """Time the scan, best of three, by CPU time."""
    from qwen3ft.data.safety import scan

    texts = [(text * 8)[start : start + 300] for text in CLEAN for start in range(0, 60, 3)]
    seconds = float("inf")
    for _ in range(REPEATS):
        started = time.process_time()
        found = [scan(text) for text, _ in zip(itertools.cycle(texts), range(rows), strict=False)]
        seconds = min(seconds, time.process_time() - started)
    assert not any(found), "the texts are clean"
    return {"rows": rows, "scanned_rows_per_second": round(rows / seconds)}, {
        f"scanning >= {SCANNED_ROWS_PER_SECOND:,} rows/s": rows >= SCANNED_ROWS_PER_SECOND * seconds
    }


MEASURES = {
    "dedup": measure_dedup,
    "tokenise": measure_tokenise,
    "scan": measure_scan,
}


def main() -> int:
    """Measure, print and save; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=list(MEASURES))
    parser.add_argument("--rows", type=int, help=f"default: {DEFAULT_ROWS}")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = arguments.rows or DEFAULT_ROWS[arguments.part]
    result, bars = MEASURES[arguments.part](rows, arguments)
    return report(result, bars, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
