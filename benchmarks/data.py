"""The data stage by the million: rows per second of each pass, and the most memory it ever took.

    python benchmarks/data.py [--rows 1000000] [--work DIR] [--out FILE]

Generates question-answer rows (seeded, of about 300 bytes, every fourth in Chinese, one in a
thousand broken or repeated), then measures in this one process, on one core: validating and mapping
alone, then the whole stage into a folder, then the same again, which finds that folder. Exits with
1 unless mapping reaches 20,000 rows/s, all of it stays within 2 GB resident, and the second run
takes at most 5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
MAPPED_ROWS_PER_SECOND = 20_000
MOST_RESIDENT_BYTES = 2 * 2**30
CACHED_SECONDS = 5.0
WORDS = (  # noqa: SIM905
    "river window garden letter market silver doctor engine paper season travel answer bridge"
    " number copper winter planet music kitchen forest history signal morning weather mountain"
).split()
SIGNS = "天地人水火山木金土日月年春夏秋冬东西南北你我他是有在不了这个大来上国和说们为子到"


def rows(count: int, seed: int) -> Iterator[str]:
    """Lines of a jsonl file."""
    chance = random.Random(seed)
    for number in range(count):
        if number % 1000 == 999:
            yield '{"question": "broken'
            continue
        if number % 4 == 0:
            question = f"{number} 号:" + "".join(chance.choices(SIGNS, k=40)) + "?"
            answer = "".join(chance.choices(SIGNS, k=60))
        else:
            question = f"{number}: " + " ".join(chance.choices(WORDS, k=18)) + "?"
            answer = " ".join(chance.choices(WORDS, k=22))
        line = json.dumps({"question": question, "answer": answer}, ensure_ascii=False)
        yield line
        if number % 1000 == 500:
            yield line


def peak_bytes() -> int:
    """The most memory that was resident in this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(path: Path, work: Path, count: int) -> dict[str, Any]:
    """Seconds and rates of each pass."""
    from qwen3ft.config import TrainingConfig
    from qwen3ft.data.pipeline import DataPipeline
    from qwen3ft.data.rows import read_file, rules_of
    from qwen3ft.data.sources import SourceFile

    config = TrainingConfig(
        model_name="embedded", data_paths=(str(path),), cache_dir=str(work / "cache")
    )
    started = time.perf_counter()
    read = sum(1 for _ in read_file(SourceFile("x", path, "train"), rules_of(config), Counter()))
    mapping_seconds = time.perf_counter() - started
    base_bytes = peak_bytes()
    started = time.perf_counter()
    manifest = DataPipeline(config).check()
    stage_seconds = time.perf_counter() - started
    started = time.perf_counter()
    again = DataPipeline(config).check()
    cached_seconds = time.perf_counter() - started
    assert again == manifest
    assert manifest.rows_read == read
    return {
        "rows": count,
        "file_bytes": path.stat().st_size,
        "rows_read": read,
        "mapped_rows_per_second": round(read / mapping_seconds),
        "stage_seconds": round(stage_seconds, 1),
        "stage_rows_per_second": round(read / stage_seconds),
        "cached_seconds": round(cached_seconds, 2),
        "tokens": manifest.train.tokens + manifest.dev.tokens,
        "peak_before_stage_gb": round(base_bytes / 2**30, 3),
        "peak_resident_gb": round(peak_bytes() / 2**30, 3),
        "train": manifest.train.rows,
        "dev": manifest.dev.rows,
        "test": manifest.test_rows,
        "quarantined": manifest.quarantined,
        "too_long": manifest.too_long,
        "duplicates": manifest.duplicates,
        "near_duplicates": manifest.near_duplicates,
    }


def main() -> int:
    """Measure, print, and say whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="qwen3ft-data-") as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in rows(options.rows, options.seed))
        result = measure(path, Path(folder), options.rows)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        **result,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, value in result.items():
        print(f"{name:24} {value:,}" if isinstance(value, int) else f"{name:24} {value}")
    held = {
        f"mapping >= {MAPPED_ROWS_PER_SECOND:,} rows/s": result["mapped_rows_per_second"]
        >= MAPPED_ROWS_PER_SECOND,
        "resident <= 2 GB": result["peak_resident_gb"] * 2**30 <= MOST_RESIDENT_BYTES,
        f"cached <= {CACHED_SECONDS:g} s": result["cached_seconds"] <= CACHED_SECONDS,
    }
    for bar, holds in held.items():
        print(f"{'held  ' if holds else 'MISSED'} {bar}")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
