"""How well memory that ran out is told from what only looks like it: counts on real messages.

    python benchmarks/classifier.py

The messages are those of `tests/support/failure_messages.py`; the classifier is
`qwen3ft.jobs.failures`, which a worker's exceptions, and the log of one that ended without a word,
go through. Needs no GPU.
"""

from __future__ import annotations

import sys

from speed_device import ROOT, machine

sys.path.append(str(ROOT / "tests"))

from support.failure_messages import (
    GPU_MEMORY_ERRORS,
    HOST_MEMORY_ERRORS,
    MEMORY_LOGS,
    NOT_MEMORY_ERRORS,
    NOT_MEMORY_LOGS,
)

from qwen3ft.errors import FinetuneError, OutOfMemoryError
from qwen3ft.jobs.failures import translate, translate_exit


def _of_exceptions(errors: list[BaseException]) -> list[tuple[str, FinetuneError]]:
    return [(f"{type(error).__name__}: {error}", translate(error, "train")) for error in errors]


def _of_logs(logs: list[str]) -> list[tuple[str, FinetuneError]]:
    return [(log.splitlines()[-1], translate_exit(1, log)) for log in logs]


def main() -> int:
    """Print every mistake, then the counts; 1 if there is a mistake."""
    positive = {
        "exceptions about GPU memory": _of_exceptions([*GPU_MEMORY_ERRORS]),
        "exceptions about host memory": _of_exceptions([*HOST_MEMORY_ERRORS]),
        "logs of native exits": _of_logs(MEMORY_LOGS),
    }
    negative = {
        "exceptions that look like it": _of_exceptions(NOT_MEMORY_ERRORS),
        "logs that look like it": _of_logs(NOT_MEMORY_LOGS),
    }
    print(f"{machine()['date']}  qwen3ft.failures\n")
    wrong = 0
    for wanted, groups in ((True, positive), (False, negative)):
        for name, found in groups.items():
            hits = [isinstance(error, OutOfMemoryError) for _, error in found]
            for (message, error), hit in zip(found, hits, strict=True):
                if hit != wanted:
                    wrong += 1
                    print(f"wrong: {type(error).__name__} for {message[:120]}")
            print(f"{name:<30} {hits.count(True):>3} of {len(hits)} taken for out of memory")
    found, false = (
        [isinstance(error, OutOfMemoryError) for group in groups.values() for _, error in group]
        for groups in (positive, negative)
    )
    print(f"\nfound {sum(found)} of {len(found)}, false {sum(false)} of {len(false)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
