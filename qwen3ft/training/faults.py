"""Planted faults for tests and chaos campaigns; off unless the environment asks for them.

`QWEN3FT_FAULTS` holds comma-separated `ACTION@step=N` or `ACTION@step=N:attempt=M` (by default
attempt 1), or `...:preflight=M` for the M-th measurement of a preflight. Actions: `oom` raises
torch's out-of-memory error, `exit` ends the process with status 1 as a native library does, `nan`
makes one gradient NaN, `kill` and `term` send the signal, `hang` stops progress, `error` raises a
ValueError. `leak@step=N:kib=K` leaks K KiB of the training device's memory at each step from N on.
`@FILE` stands for what the file holds then.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3ft.errors import ConfigError

VARIABLE = "QWEN3FT_FAULTS"

_FORM = re.compile(
    r"(?:(oom|exit|nan|kill|term|hang|error)@step=(\d+)"
    r"|(leak)@step=(\d+):kib=(\d+))(?::(attempt|preflight)=(\d+))?"
)
_LEAKED: list[Any] = []


@dataclass(frozen=True)
class Fault:
    """A fault before optimizer step `step` of an attempt, or of a preflight's measurement."""

    action: str
    step: int
    """Step before which it strikes; a leak also strikes before all later ones."""
    attempt: int = 1
    """Number of the attempt; 0 for a preflight."""
    leak_bytes: int = 0
    """Bytes to leak at each step."""
    preflight: int = 0
    """Number of the measurement; 0 for an attempt."""

    def is_due(self, step: int) -> bool:
        """Return True if it strikes before optimizer step `step`."""
        return step >= self.step if self.action == "leak" else step == self.step


def planted_faults() -> list[Fault]:
    """Return the faults that the environment asks for.

    Raises:
        ConfigError: the variable has another format.
        OSError: its file cannot be read.
    """
    text = os.environ.get(VARIABLE, "")
    if text.startswith("@"):
        text = Path(text[1:]).read_text(encoding="utf-8").strip()
    faults = []
    for item in filter(None, text.split(",")):
        match = _FORM.fullmatch(item.strip())
        if match is None:
            raise ConfigError(
                f"{VARIABLE} holds {item!r}, which is not a planted fault.",
                why=f"The form is {_FORM.pattern}.",
                next_command=f"unset {VARIABLE}",
            )
        faults.append(
            Fault(
                match[1] or match[3],
                int(match[2] or match[4]),
                leak_bytes=int(match[5] or 0) * 1024,
                **{"attempt": 0, match[6] or "attempt": int(match[7] or 1)},
            )
        )
    return faults


def planted_in_preflight(number: int) -> list[Fault]:
    """Return the faults for measurement `number` of a preflight."""
    return [fault for fault in planted_faults() if fault.preflight == number]


def strike(fault: Fault, model: Any) -> None:
    """Make `fault` happen in this process, which trains `model`."""
    import torch

    match fault.action:
        case "oom":
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 594.00 MiB. GPU 0 has a total capacity of "
                "13.00 GiB of which 231.44 MiB is free. (planted)"
            )
        case "exit":
            print("Error out of memory at line 92 in file /src/csrc/ops.cu", flush=True)  # noqa: T201
            os._exit(1)
        case "nan":
            parameter = next(p for p in model.parameters() if p.requires_grad)
            parameter.register_hook(lambda gradient: gradient * float("nan"))
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "hang":
            time.sleep(3600)
        case "error":
            raise ValueError("planted error")
        case "leak":
            place = next(model.parameters()).device
            _LEAKED.append(torch.ones(fault.leak_bytes, dtype=torch.uint8, device=place))
