"""Promotions and rollbacks under a server that answers many clients.

    PYTHONPATH=tests python -m benchmarks.server.swap [--moves 20] [--clients 50] [--out FILE]

Two adapters whose answers to 16 questions are known are promoted and rolled back in turn while the
clients ask without a pause. Exits with 1 if a request failed, if an answer is not that of the
version which the response names, or if a new champion answered later than 10 s after the alias.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from support.registered import MODEL

from benchmarks.machine import machine, write_json
from benchmarks.server.place import BY_HAND, Clients, Place, make_place

SOON_SECONDS = 10.0


def main() -> None:
    """Run the campaign, print and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(Path(folder), max_new_tokens=16)
        result = {"machine": machine(), **measure(place, arguments.moves, arguments.clients)}
    print(result)
    if arguments.out:
        write_json(arguments.out, result)
    sys.exit(bool(result["failed"] or result["of_another_version"] or result["late"]))


def measure(place: Place, moves: int, clients: int) -> dict[str, Any]:
    """Return what the clients saw during that many promotions and as many rollbacks."""
    old = place.add("night-0", place.trained.early)
    new = place.add("night-1", place.trained.saved)
    place.promote(old)
    questions = [row["question"] for row in place.trained.rows]
    delays: list[float] = []
    with (
        place.served(slots=16, queue=64) as server,
        Clients(server, questions, clients) as asking,
    ):
        for _ in range(moves):
            for number in (new, old):
                if number == new:
                    place.promote(new)
                else:
                    place.registry.rollback(MODEL, BY_HAND, verify=False)
                moved = time.monotonic()
                asking.wait_for(lambda: _answered(asking, number, moved), 60)  # noqa: B023
                delays.append(time.monotonic() - moved)
    replies = asking.replies
    wrong = [one for one in replies if one.status == 200 and not _is_right(place, one)]
    failed = [one for one in replies if one.status != 200]
    return {
        "clients": clients,
        "moves": len(delays),
        "requests": len(replies),
        "failed": len(failed),
        "first_failure": failed[0].answer if failed else "",
        "of_another_version": len(wrong),
        "seconds_until_the_new_champion_answers": {
            "median": round(sorted(delays)[len(delays) // 2], 2),
            "most": round(max(delays), 2),
        },
        "late": sum(delay > SOON_SECONDS for delay in delays),
    }


def _answered(asking: Clients, number: str, since: float) -> bool:
    return any(one.version == number and one.asked_at >= since for one in asking.replies[-200:])


def _is_right(place: Place, reply: Any) -> bool:
    return bool(place.answers[reply.version][reply.row] == reply.answer)


if __name__ == "__main__":
    main()
