"""Planted versions on trial: bad ones are to be rolled back, good ones to be used.

    PYTHONPATH=tests python -m benchmarks.server.canary [--each 5] [--good 20] [--share 0.05]
                                                        [--clients 4] [--lanes 1] [--out FILE]

A server follows the registry with `--canary`, and the clients ask. `--each` adapters of each kind
of bad answers (empty, endless, slow, in another language) and `--good` good ones are promoted one
after the other, in mixed order. The proof against the run's test is off: it says only that a
version answers as tested, and these do. Exits with 1 if a bad version was used, a good one rolled
back or not decided about, or more than 5 % of all requests of the trials of bad ones saw a bad
answer.

A good version needs 100 answers, at a share of 5 % about 2,000 requests, so the rate of answers
decides how long that takes. With `--lanes` so many servers, each with a worker and clients of its
own, take a part of the versions each at the same time: one for every two or three cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from support.planted_adapters import KINDS, plant_several
from support.registered import MODEL

from benchmarks.machine import machine, write_json
from benchmarks.server.place import Clients, Place, make_place
from qwen3ft.records.model import SavedAdapter
from qwen3ft.registry.aliases import TRIAL_TAG
from qwen3ft.server.follower import Canary

MOST_SHARE_OF_BAD = 0.05
MOST_TRIAL_SECONDS = 600.0
ANSWER_TOKENS = 128


def main() -> None:
    """Run the campaign, print and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--each", type=int, default=5)
    parser.add_argument("--good", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--clients", type=int, default=4, help="of each server")
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.lanes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    works = [(arguments, lane) for lane in range(arguments.lanes)]
    with multiprocessing.get_context("spawn").Pool(arguments.lanes) as pool:
        trials = [trial for lane in pool.starmap(run_lane, works) for trial in lane]
    bad = [one for one in trials if one["kind"] != "good"]
    share = sum(one["bad_answers"] for one in bad) / max(1, sum(one["requests"] for one in bad))
    result = {
        "machine": machine(),
        "share": arguments.share,
        "lanes": arguments.lanes,
        "bad": len(bad),
        "bad_rolled_back": sum(one["rolled_back"] for one in bad),
        "good": len(trials) - len(bad),
        "good_rolled_back": sum(one["rolled_back"] for one in trials if one["kind"] == "good"),
        "share_of_requests_with_a_bad_answer": round(share, 4),
        "trials": trials,
    }
    print({name: value for name, value in result.items() if name != "trials"})
    if arguments.out:
        write_json(arguments.out, result)
    undecided = sum(not one["decided"] for one in trials)
    missed = result["bad"] - result["bad_rolled_back"] + result["good_rolled_back"] + undecided
    sys.exit(bool(missed or share > MOST_SHARE_OF_BAD))


def run_lane(asked: argparse.Namespace, lane: int) -> list[dict[str, Any]]:
    """Run the trials of one lane's part of the planted versions."""
    with tempfile.TemporaryDirectory() as folder:
        return run_trials(make_place(Path(folder), ANSWER_TOKENS), asked, lane)


def run_trials(place: Place, asked: argparse.Namespace, lane: int) -> list[dict[str, Any]]:
    """Promote a lane's part of the planted versions, and return what came of it."""
    planted: list[tuple[str, SavedAdapter]] = []
    for kind in KINDS:
        count = asked.good if kind == "good" else asked.each
        planted += [(kind, one) for one in plant_several(place.trained, kind, place.folder, count)]
    random.Random(0).shuffle(planted)
    versions = [
        (kind, place.add(Path(saved.path).name, saved, keep=False))
        for kind, saved in planted[lane :: asked.lanes]
    ]
    place.promote(place.add("night-1", place.trained.saved))
    questions = [row["question"] for row in place.trained.rows]
    trials = []
    with (
        place.served(canary=Canary(asked.share), probe_rows=0, slots=16, queue=64) as server,
        Clients(server, questions, asked.clients) as asking,
    ):
        for kind, number in versions:
            trials.append(_run_trial(place, asking, kind, number))
            print(trials[-1], flush=True)
    return trials


def _run_trial(place: Place, asking: Clients, kind: str, number: str) -> dict[str, Any]:
    before, first, started = place.champion, len(asking.replies), time.monotonic()
    place.promote(number)

    def outcome() -> str:
        version = place.registry.version(MODEL, number)
        assert version is not None
        return version.tags.get(TRIAL_TAG, "")

    asking.wait_for(lambda: bool(outcome()), MOST_TRIAL_SECONDS)
    replies = asking.replies[first:]
    counts = Counter(reply.version for reply in replies)
    return {
        "kind": kind,
        "version": number,
        "decided": bool(outcome()),
        "rolled_back": outcome().startswith("rolled back"),
        "champion_again": place.champion == before,
        "requests": len(replies),
        "bad_answers": counts[number] if kind != "good" else 0,
        "failed": sum(reply.status != 200 for reply in replies),
        "seconds": round(time.monotonic() - started, 1),
        "outcome": outcome(),
    }


if __name__ == "__main__":
    main()
