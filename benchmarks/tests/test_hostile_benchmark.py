"""The campaign of hostile artifacts finds what ends badly, and has as many cases as it says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.hostile import campaign
from benchmarks.hostile.cases import all_cases, case_named
from benchmarks.hostile.probes import ENDS


def test_there_are_many_cases_of_each_kind() -> None:
    """Their names are unique; what may be accepted says why."""
    kinds = Counter(case.kind for case in all_cases())
    assert kinds["data"] + kinds["config"] + kinds["id"] >= 150
    assert min(kinds.values()) >= 10


@pytest.mark.parametrize("name", ENDS)
def test_a_planted_case_is_found_to_have_ended_badly(tmp_path: Path, name: str) -> None:
    """Code that runs, a hang, too much memory, library errors, what is accepted in silence."""
    ended = campaign.run_case(case_named(name), tmp_path)
    assert ended.ended_as == ENDS[name][1], ended
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_counted_and_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints a table with date and machine, and returns 0 if all went well."""
    out = tmp_path / "hostile.json"
    assert campaign.main(["--case", "config-alias-bomb", "--out", str(out)]) == 0
    stored = json.loads(out.read_text())
    assert stored["counts"]["config"]["refused"] == stored["cases"] == 1
    assert "| config | 0 | 0 | 0 | 0 | 0 | 1 | 0 |" in capsys.readouterr().out
