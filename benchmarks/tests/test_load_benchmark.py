"""The campaign of load: what it says where nothing came back."""

from __future__ import annotations

from collections import Counter

from benchmarks.server.load import Load


def test_a_server_that_answers_nothing_misses_a_bar() -> None:
    """There is no mean of no answers."""
    load = object.__new__(Load)
    load.statuses, load.run_seconds = Counter({"429": 3}), 1.0
    load.took_seconds = {"200": [], "429": [0.1, 0.1, 0.1]}
    load.left_in_progress = 0
    load.memory = {"server": [(0.0, 1.0), (1.0, 1.0)], "worker": [(0.0, 1.0), (1.0, 1.0)]}
    assert load.bars(96) == {"something was answered": False}
