"""One hostile artifact: how it is built, and how qwen3ft opens it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """An artifact from outside, and the way by which it gets in.

    Both functions run in processes of their own, in the folder `inside`. Nothing may appear beside
    it: neither a file that a path led out to, nor the canary (`canary_of`) of code that was run.
    """

    name: str
    kind: str
    """Sort of artifact: data, config, id, adapter, model, tokenizer, template ..."""
    build: Callable[[Path], None]
    """Writes the artifact into the folder."""
    open: Callable[[Path], str]
    """Opens the artifact as qwen3ft does; returns how it was dealt with, such as `row 3
    quarantined: too_deep`, or '' if it was taken as it is. A refusal is a FinetuneError."""
    imports: tuple[str, ...] = ()
    """Modules to import before the clock starts, so that torch is not taken for a hang."""
    harmless: str = ""
    """Reason why it may be taken as it is: it looks hostile, and nothing comes of it."""


def canary_of(inside: Path) -> Path:
    """Return the file that a payload in `inside` writes if anything runs it."""
    return inside.parent / "canary"
