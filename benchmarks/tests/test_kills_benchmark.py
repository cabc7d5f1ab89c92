"""The campaign of interruptions draws every kind, loses what a power cut loses, and sees it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from benchmarks.kills.campaign import Campaign
from benchmarks.kills.power import drop_unsynced
from benchmarks.kills.strikes import KINDS, POINTS, Blow, Strike, draw
from benchmarks.kills.trainings import IDENTICAL, IDENTICAL_TOO, Result
from qwen3ft.faults import planted_faults

OUTCOME = dict.fromkeys((*IDENTICAL, *IDENTICAL_TOO), 1)
LINES = ((1, 2.5, None, 0.1, 1.0), (1, None, 2.25, 0.0, None))
RESULT = Result("a" * 64, "b" * 64, OUTCOME, LINES)

WRITES = {
    "nothing is synced": ("(root / 'new').write_text('new')", {"old": "old"}),
    "a file is synced and its name is not": (
        "sync(root / 'new', 'new')",
        {"old": "old"},
    ),
    "a name is synced and its file is not": (
        "(root / 'new').write_text('new'); fsync_dir(root)",
        {"old": "old", "new": ""},
    ),
    "both are synced": (
        "sync(root / 'new', 'new'); fsync_dir(root)",
        {"old": "old", "new": "new"},
    ),
    "what was added after the sync": (
        "sync(root / 'new', 'ne'); fsync_dir(root); (root / 'new').open('a').write('w')",
        {"old": "old", "new": "ne"},
    ),
    "a rename that is not synced": (
        "sync(root / 'new', 'new'); fsync_dir(root); (root / 'new').rename(root / 'newer')",
        {"old": "old", "new": "new"},
    ),
    "an atomic write": (
        "write_bytes_atomic(root / 'old', b'new')",
        {"old": "new"},
    ),
    "a folder whose own name is not synced": (
        "(root / 'sub').mkdir(); sync(root / 'sub' / 'new', 'new'); fsync_dir(root / 'sub')",
        {"old": "old"},
    ),
    "a folder of make_folder": (
        "sub = root / 'a' / 'b'; make_folder(sub); sync(sub / 'new', 'new'); fsync_dir(sub)",
        {"old": "old", "a/b/new": "new"},
    ),
}
PROGRAM = """
import os, signal, sys
from pathlib import Path
from benchmarks.kills.power import record_syncs
from qwen3ft.disk.files import fsync_dir, fsync_file, make_folder, write_bytes_atomic
root, records = map(Path, sys.argv[1:])
def sync(path, text):
    path.write_text(text)
    fsync_file(path)
record_syncs(root, records)
WORK
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("case", WRITES)
def test_a_power_cut_leaves_what_was_synced(tmp_path: Path, case: str) -> None:
    """Contents by the sync of their file, names by that of their folder."""
    work, left = WRITES[case]
    root, records = tmp_path / "root", tmp_path / "records"
    root.mkdir()
    records.mkdir()
    (root / "old").write_text("old")
    program = PROGRAM.replace("WORK", work)
    done = subprocess.run([sys.executable, "-c", program, str(root), str(records)], check=False)
    assert done.returncode == -9
    drop_unsynced(root, records)
    found = {
        path.relative_to(root).as_posix(): path.read_text()
        for path in root.rglob("*")
        if path.is_file()
    }
    assert found == left


def test_every_kind_and_point_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand draws have each often enough, and each planted one is understood."""
    random = Random(0)
    strikes = [draw(random, 5.0) for _ in range(1000)]
    kinds = Counter(strike.kind for strike in strikes)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 50
    points = Counter(strike.point.partition(":")[0] for strike in strikes if strike.point)
    assert set(points) == set(POINTS)
    for strike in strikes:
        monkeypatch.setenv("QWEN3FT_FAULTS", strike.faults)
        assert len(planted_faults()) == bool(strike.point)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (RESULT, []),
        (Result("c" * 64, "b" * 64, OUTCOME, LINES), ["adapter"]),
        (Result("a" * 64, "c" * 64, OUTCOME, LINES), ["state"]),
        (Result("a" * 64, "b" * 64, {**OUTCOME, "best_step": 5}, LINES), ["best_step"]),
        (Result("a" * 64, "b" * 64, OUTCOME, LINES[:1]), ["metrics"]),
        (Result("a" * 64, "b" * 64, OUTCOME, (*LINES, LINES[1])), ["metrics"]),
    ],
)
def test_every_difference_is_named(other: Result, named: list[str]) -> None:
    """A lost and a doubled metric too."""
    assert [text.partition(":")[0] for text in other.differences(RESULT)] == named


def test_what_did_not_strike_does_not_count() -> None:
    """An attempt that ended before its interruption came is none."""
    campaign = Campaign(0)
    campaign.count("fused", Blow(Strike("kill"), False, True, "completed", "finish"))
    assert campaign.interruptions == 0
    campaign.count("fused", Blow(Strike("kill"), True, False, "WorkerCrashedError", "train"))
    assert (campaign.interruptions, campaign.by_path["fused"]) == (1, 1)
