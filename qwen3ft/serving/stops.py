"""Texts at which an answer ends, found while it is streamed."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes an answer on up to the first of the stop texts, which may come in pieces.

    Args:
        stops: Texts that end the answer and are not part of it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False
        """True once a stop text came."""

    def feed(self, text: str) -> str:
        """Add text; return what is certainly before a stop text by now."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held, self.found = "", True
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def close(self) -> str:
        """Return what was held back; no stop text comes any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
