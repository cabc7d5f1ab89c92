"""One part of the scaling benchmark in a process of its own, which prints its result.

It sees the GPUs of the part alone, and starts workers on them as the flow does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.jobs import RESULT
from benchmarks.scaling.exam import exam
from benchmarks.scaling.exchange import exchange, exchange_as_rank
from benchmarks.scaling.tight import tight
from benchmarks.scaling.training import train, train_despite_kills
from qwen3ft import logs


def main(arguments: Sequence[str]) -> None:
    """Run the part whose file is the first argument, and print its result."""
    path = Path(arguments[0])
    values = json.loads(path.read_text(encoding="utf-8"))
    if len(arguments) > 1:
        exchange_as_rank(path.parent, int(arguments[1]))
        return
    logs.configure(console=True)
    parts: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "exchange": exchange,
        "train": train,
        "kill": train_despite_kills,
        "exam": exam,
        "tight": tight,
    }
    print(RESULT + json.dumps(parts[values["kind"]](values)))


if __name__ == "__main__":
    main(sys.argv[1:])
