"""Planted cases that end in each of the bad ways, to test the campaign itself."""

from __future__ import annotations

from pathlib import Path

from benchmarks.hostile.case import Case, canary_of


def _nothing(_: Path) -> None:
    pass


def _run_it(inside: Path) -> str:
    canary_of(inside).touch()
    return "refused, too late"


def _steer(_: Path) -> str:
    print("\x1b[2J")
    return "shown"


def _write_outside(inside: Path) -> str:
    (inside / ".." / "x").mkdir()
    return "refused, too late"


def _hang(_: Path) -> str:
    while True:
        pass


def _hold(_: Path) -> str:
    held = bytearray(2**31)
    held[:: 2**12] = b"x" * len(held[:: 2**12])
    while True:
        pass


def _raise(_: Path) -> str:
    raise KeyError("lora_alpha")


def _crash(_: Path) -> str:
    import os

    os.abort()


def _say_too_little(_: Path) -> str:
    from qwen3ft.errors import ConfigError

    raise ConfigError("It is wrong.")


def _accept(_: Path) -> str:
    return ""


ENDS = {
    "canary": (_run_it, "executed"),
    "steering": (_steer, "executed"),
    "outside": (_write_outside, "executed"),
    "hang": (_hang, "hung"),
    "hold": (_hold, "memory"),
    "raise": (_raise, "unclassified"),
    "crash": (_crash, "unclassified"),
    "says-too-little": (_say_too_little, "unclassified"),
    "accept": (_accept, "accepted"),
}
"""How the campaign must find each of the cases to have ended."""

CASES = tuple(Case(name, "probe", _nothing, open_it) for name, (open_it, _) in ENDS.items())
