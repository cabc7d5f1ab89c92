"""Planted faults for tests and chaos campaigns; off unless the environment asks for them.

`QWEN3FT_FAULTS` holds comma-separated items of one of these forms:

    ACTION@step=N               before optimizer step N of attempt 1; `...:attempt=M` of attempt M,
                                `...:preflight=M` of the M-th measurement of a preflight;
                                `...:rank=R` last: in rank R alone, otherwise in every rank
    leak@step=N:kib=K           leaks K KiB of the training device's memory at each step from N on
    ACTION@point=NAME           where code commits something, one of `POINTS`; `...:hit=N` when a
                                process gets there for the N-th time instead of the first

`kill`, `term` and `stop` send the signal to this process, `exit` ends it with status 1 as a native
library does, `hang` stops progress, `full` raises the error of a full disk, and `error` raises a
ValueError. Only at steps, `oom` raises torch's out-of-memory error and `nan` makes a gradient NaN.
`@FILE` stands for what the file holds then.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qwen3ft.errors import ConfigError

VARIABLE = "QWEN3FT_FAULTS"

POINTS = {
    "file.written": "the temporary file has its content, which is not durable",
    "file.synced": "the temporary file is durable, and does not have its name",
    "file.renamed": "the file has its name, which is not durable",
    "folder.filled": "a folder's files are written, and its manifest is not",
    "folder.listed": "the manifest is written, and the folder does not have its name",
    "folder.exchanged": "the new folder has the name, the older one that of the unfinished",
    "folder.retired": "an older folder of the name is out of the way, the new one not in its place",
    "folder.renamed": "the folder has its name, which is not durable",
    "step.done": "an optimizer step is done, and nothing of it is recorded",
    "evaluation.begun": "an evaluation has begun; each further visit is a held-out batch",
    "evaluation.logged": "the held-out loss is logged, and not compared with the best",
    "evaluation.marked": "the best step is known in memory only",
    "checkpoint.committed": "a checkpoint is complete, and older ones are not pruned",
    "checkpoint.pruned": "older checkpoints are gone",
    "training.over": "the last checkpoint is written, and the outcome is not",
    "answers.begun": "the decoder is ready, and has answered nothing",
    "journal.appended": "an operation is in the journal, and its caller does not know",
    "cursor.sent": "MLflow has an operation, and the cursor has not moved",
    "version.created": "a version is registered, and the run does not know it",
    "move.begun": "a move of an alias is recorded, and nothing has moved",
    "move.prepared": "the previous version is set, the champion not yet",
    "move.made": "the champion is set, and the move is not recorded as done",
}
"""Places where a process may be interrupted while it commits something: {name: what is true}."""

_FORM = re.compile(
    r"(?:(?P<action>oom|exit|nan|kill|term|stop|hang|error)@step=(?P<step>\d+)"
    r"|(?P<leak>leak)@step=(?P<from>\d+):kib=(?P<kib>\d+))"
    r"(?::(?P<kind>attempt|preflight)=(?P<number>\d+))?(?::rank=(?P<rank>\d+))?"
    r"|(?P<at_point>exit|kill|term|stop|hang|full|error)@point=(?P<point>[a-z.]+)"
    r"(?::hit=(?P<hit>\d+))?"
)
_reached: Counter[tuple[str, str]] = Counter()
"""Visits by what was planted then and the point."""


@dataclass(frozen=True)
class Fault:
    """A fault before an optimizer step of an attempt or preflight, or at a point of the code."""

    action: str
    step: int = 0
    """Step before which it strikes; a leak also strikes before all later ones."""
    attempt: int = 0
    """Number of the attempt; 0 for a preflight or a point."""
    leak_bytes: int = 0
    """Bytes to leak at each step."""
    preflight: int = 0
    """Number of the measurement; 0 for an attempt or a point."""
    point: str = ""
    """One of `POINTS`; '' for a step."""
    hit: int = 1
    """Number of the visit to the point at which it strikes."""
    rank: int | None = None
    """Rank in which it strikes; None for all."""

    def is_for(self, attempt: int, rank: int) -> bool:
        """Return True if it strikes in this rank of this attempt."""
        return self.attempt == attempt and self.rank in (None, rank)

    def is_due(self, step: int) -> bool:
        """Return True if it strikes before optimizer step `step`."""
        return step >= self.step if self.action == "leak" else step == self.step


def planted_faults() -> list[Fault]:
    """Return the faults that the environment asks for.

    Raises:
        ConfigError: the variable has another format, or names no point of the code.
        OSError: its file cannot be read.
    """
    text = os.environ.get(VARIABLE, "")
    if text.startswith("@"):
        text = Path(text[1:]).read_text(encoding="utf-8").strip()
    return [_parse(item.strip()) for item in text.split(",") if item]


def planted_in_preflight(number: int) -> list[Fault]:
    """Return the faults for measurement `number` of a preflight."""
    return [fault for fault in planted_faults() if fault.preflight == number > 0]


def reach(point: str) -> None:
    """Strike if the environment plants a fault at this point of the code, one of `POINTS`."""
    if not (planted := os.environ.get(VARIABLE)):
        return
    _reached[planted, point] += 1
    for fault in planted_faults():
        if (fault.point, fault.hit) == (point, _reached[planted, point]):
            strike_process(fault)


def strike_process(fault: Fault) -> None:
    """Make `fault`, which needs no model, happen in this process."""
    match fault.action:
        case "exit":
            print("Error out of memory at line 92 in file /src/csrc/ops.cu", flush=True)  # noqa: T201
            os._exit(1)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(3600)
        case "full":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (planted)")
        case "error":
            raise ValueError("planted error")


def _parse(item: str) -> Fault:
    match = _FORM.fullmatch(item)
    if match is None or (match["point"] or "file.written") not in POINTS:
        raise ConfigError(
            f"{VARIABLE} holds {item!r}, which is not a planted fault.",
            why=f"The form is {_FORM.pattern}, and points are {', '.join(POINTS)}.",
            next_command=f"unset {VARIABLE}",
        )
    if match["point"]:
        return Fault(match["at_point"], point=match["point"], hit=int(match["hit"] or 1))
    number, in_preflight = int(match["number"] or 1), match["kind"] == "preflight"
    return Fault(
        match["action"] or match["leak"],
        int(match["step"] or match["from"]),
        attempt=0 if in_preflight else number,
        leak_bytes=int(match["kib"] or 0) * 1024,
        preflight=number if in_preflight else 0,
        rank=None if match["rank"] is None else int(match["rank"]),
    )
