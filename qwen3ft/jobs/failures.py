"""Turns foreign exceptions, exit codes and signals into errors of this project.

Memory that ran out is recognised in every known wording of torch, cuBLAS, cuDNN, NCCL, Triton,
bitsandbytes, numpy, pyarrow, the C++ and Rust runtimes and the kernel. Damaged files (safetensors,
JSON) are recognised by their readers, not here.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

from qwen3ft.errors import (
    FinetuneError,
    OutOfMemoryError,
    PreemptedError,
    SaveError,
    WorkerCrashedError,
)
from qwen3ft.jobs.failure_rules import RULES, Rule, line_types
from qwen3ft.logs import mask_secrets
from qwen3ft.text.commands import shell_line
from qwen3ft.units import GIB, MIB, gb

QUOTED_CHARACTERS = 600
"""Longest quotation of a foreign message."""

_SIZE = r"([\d.]+) ?([KMGT]i?B|bytes)"
_NUMBERS = {
    "tried_gb": rf"(?i:to allocate|malloc of size|allocation of) {_SIZE}",
    "free_gb": rf"{_SIZE} (?:is )?free",
    "total_gb": rf"total capacity of {_SIZE}|{_SIZE} total capacity",
    "allocated_gb": rf"{_SIZE} (?:is allocated by PyTorch|already allocated)",
    "allowed_gb": rf"{_SIZE} (?:max )?allowed",
}
_UNITS = {"bytes": 1, "K": 2**10, "M": MIB, "G": GIB, "T": 2**40}


def memory_numbers(message: str) -> dict[str, float]:
    """Extract the sizes in an out-of-memory message, in GB, by name."""
    found = {}
    for name, pattern in _NUMBERS.items():
        if match := re.search(pattern, message):
            amount, unit = [group for group in match.groups() if group]
            scale = _UNITS.get(unit) or _UNITS[unit[0]]
            found[name] = round(gb(float(amount) * scale), 4)
    return found


def translate(error: BaseException, phase: str) -> FinetuneError:
    """Return the error of this project that describes `error`.

    Its chain of causes is searched, the outermost first. An error of this project is returned as it
    is, with `phase` added to its facts.

    Args:
        error: The exception.
        phase: Phase in which it was raised, as the heartbeat names it.
    """
    for link in _chain(error):
        if isinstance(link, FinetuneError):
            link.facts.setdefault("phase", phase)
            return link
        if isinstance(link, KeyboardInterrupt):
            return _preempted("SIGINT", phase)
        names = frozenset(kind.__name__ for kind in type(link).__mro__)
        if rule := next((rule for rule in RULES if rule.applies(names, str(link))), None):
            return _build(rule, type(link).__name__, str(link), phase)
    return WorkerCrashedError(
        f"Unexpected {_quote(type(error).__name__, str(error))}" + _during(phase),
        why="No known failure has this type and message; the log has the traceback.",
        next_command="qwen3ft status",
        phase=phase,
        error_type=type(error).__name__,
    )


def translate_exit(
    returncode: int, log_tail: str, *, oom_kills: int = 0, phase: str = ""
) -> FinetuneError:
    """Explain why a worker ended that left neither an outcome nor a failure.

    A signal from outside explains itself. Otherwise the last line of the log that a rule knows
    decides, because native code may print a reason and call exit().

    Args:
        returncode: As `subprocess` returns it; a shell's 128 + n is read as signal n.
        log_tail: End of the worker's output.
        oom_kills: Processes that the kernel killed for memory meanwhile.
        phase: Phase named in the worker's last heartbeat.
    """
    number = -returncode if returncode < 0 else returncode - 128
    name = signal.Signals(number).name if number in set(signal.Signals) else ""
    if name in ("SIGTERM", "SIGINT"):
        return _preempted(name, phase)
    if name == "SIGKILL" and oom_kills > 0:
        return OutOfMemoryError(
            f"The kernel killed the worker to free host memory{_during(phase)}.",
            why=f"Its out-of-memory killer ended {oom_kills} process(es) of this group meanwhile.",
            next_command="qwen3ft doctor",
            phase=phase,
            domain="host",
            returncode=returncode,
        )
    for line in reversed(log_tail.splitlines()):
        names, message = line_types(line)
        if rule := next((rule for rule in RULES if rule.applies(names, message)), None):
            error = _build(rule, next(iter(names), "log"), message, phase)
            error.facts["returncode"] = returncode
            return error
    return _unexplained(returncode, name, phase)


def folder_gone(path: Path) -> SaveError:
    """Return the error for work whose folder was deleted meanwhile."""
    return SaveError(
        f"{path} was deleted or unmounted while it was in use.",
        why="Someone removed it, or its file system went away; the work in it is lost.",
        next_command=shell_line("ls", "-ld", path.parent),
        path=str(path),
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error`, the members of its group and its causes, each once."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        link = pending.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        if isinstance(link, BaseExceptionGroup):
            pending.extend(link.exceptions)
        pending.append(link.__cause__ or (None if link.__suppress_context__ else link.__context__))


def _build(rule: Rule, type_name: str, message: str, phase: str) -> FinetuneError:
    numbers = memory_numbers(message) if rule.kind is OutOfMemoryError else {}
    sizes = ", ".join(f"{name[:-3]} {value:g} GB" for name, value in numbers.items())
    return rule.kind(
        f"{rule.what}{_during(phase)}: {sizes or _quote(type_name, message)}",
        why=rule.why,
        next_command=rule.next_command,
        **rule.facts,
        **numbers,
        phase=phase,
        error_type=type_name,
        message=mask_secrets(message[:QUOTED_CHARACTERS]),
    )


def _preempted(name: str, phase: str) -> PreemptedError:
    return PreemptedError(
        f"The worker was asked to stop by {name}{_during(phase)}.",
        why="Someone, a scheduler or a shutdown ended it; nothing is wrong with the run.",
        next_command="qwen3ft status",
        phase=phase,
        signal=name,
    )


def _unexplained(returncode: int, name: str, phase: str) -> FinetuneError:
    if name == "SIGXFSZ":
        return SaveError(
            f"A file could not be written{_during(phase)}: it grew beyond the limit.",
            why="The size of files is limited for this process.",
            next_command="ulimit -f",
            phase=phase,
            returncode=returncode,
        )
    how = f"was killed by {name}" if name else f"ended with exit code {returncode}"
    why = "It left no failure, and its log names no known cause."
    if name == "SIGKILL":
        why = "The kernel counted no out-of-memory kill, so some other process sent the signal."
    return WorkerCrashedError(
        f"The worker {how}{_during(phase)}.",
        why=why,
        next_command="qwen3ft status",
        phase=phase,
        returncode=returncode,
        signal=name,
    )


def _during(phase: str) -> str:
    return f" (phase: {phase})" if phase else ""


def _quote(type_name: str, message: str) -> str:
    first_line = next((line for line in message.splitlines() if line.strip()), "no message")
    return mask_secrets(f"{type_name}: {first_line[:QUOTED_CHARACTERS]}")
