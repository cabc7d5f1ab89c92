"""Ids and names that become part of a path, a query or a page."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from qwen3ft.text.plain import is_plain

_MOST_BYTES = 200
"""File systems take 255, and some names get an ending."""


def flaw_of_name(name: str) -> str:
    """Say why `name` cannot be the name of one folder and of a model in MLflow; '' if it can."""
    if not name or name != name.strip():
        return "it is empty, or begins or ends with a space"
    if name.startswith("."):
        return "it begins with a dot"
    if not is_plain(name) or not set("/\\:'\"").isdisjoint(name):
        return "it holds a slash, colon, quote or control character"
    if len(name.encode()) > _MOST_BYTES:
        return f"it is longer than {_MOST_BYTES} bytes"
    return ""


def closest_name(name: str, names: Iterable[str]) -> str:
    """Return the one of `names` that `name` was probably meant to be; '' if none is near."""
    known = list(names)
    whole = {_without_signs(each): each for each in known}
    parts = {part: each for each in reversed(known) for part in each.split("_")}
    wanted = _without_signs(name)
    for plain, cutoff in ((whole, 0.7), (parts, 0.85)):
        if near := difflib.get_close_matches(wanted, plain, n=1, cutoff=cutoff):
            return plain[near[0]]
    return ""


def _without_signs(name: str) -> str:
    return "".join(character for character in name.lower()[:_MOST_BYTES] if character.isalnum())
