"""The decoder on some GPUs, each of which answers a share of the questions."""

from __future__ import annotations

import heapq
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.answers.cases import Case
from benchmarks.jobs import run_job
from benchmarks.speed.cases import TINY
from qwen3ft.disk.files import sha256_json

CONTESTANTS = "benchmarks.answers.contestants"
SEED = 0


def answer_case(model: str, models: int, questions: int) -> Case:
    """Return the questions to as many of base, candidate and champion."""
    if model == TINY:
        return Case(model, 4.0, 16, questions // 25, models)
    return Case(model, 13.0, 256, questions, models)


def answer(
    case: Case,
    snapshot: Mapping[str, Any],
    folders: Sequence[Path],
    gpus: Sequence[str],
    limit_seconds: float,
) -> dict[str, Any]:
    """Answer with a decoder for each of the folders, and the GPU in its place, if there are any."""
    tiny, ranks = case.shape == TINY, len(folders)
    values = {
        "case": asdict(case),
        "contestant": "ours",
        "snapshot": snapshot,
        "seed": SEED,
        "shuffles": 0,
        "alone": False,
        "slots": 8 if tiny else 0,
        "resident": True,
    }

    def share(number: int) -> dict[str, Any]:
        own, folder = values | {"share": [number, ranks]}, folders[number]
        result = run_job(CONTESTANTS, folder, own, limit_seconds, gpus and [gpus[number]])
        return result | {"answers": json.loads((folder / "answers.json").read_bytes())}

    with ThreadPoolExecutor(ranks) as pool:
        shares = list(pool.map(share, range(ranks)))
    answers = [each.pop("answers") for each in shares]
    count = case.questions * case.models
    merged = [answers[index % ranks][index // ranks] for index in range(count)]
    lengths, slots = [len(each) for each in merged], shares[0]["sizes"]["slots"]
    steps = [steps_needed(lengths[number::ranks], slots) for number in range(ranks)]
    return {
        "tokens_per_second": sum(lengths) / max(each["seconds"] for each in shares),
        "nvml_gb": [each["nvml_gb"] for each in shares],
        "sizes": [each["sizes"] for each in shares],
        "answer_seconds": [each["seconds"] for each in shares],
        "slots": slots,
        "steps_needed": steps,
        "speedup_by_steps": steps_needed(lengths, slots) / max(steps),
        "digest": sha256_json(merged),
    }


def steps_needed(lengths: Sequence[int], slots: int) -> int:
    """Return the decoder's steps for answers of these lengths, each in the first slot that is free.

    More GPUs than it takes to begin all answers at once save none: the longest takes its time.
    """
    ends = [0] * slots
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)
