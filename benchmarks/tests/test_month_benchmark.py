"""The simulated month is what it says, and its checks find what they are there for."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gate.nights import clean_rows
from benchmarks.month import campaign as month
from benchmarks.month.checks import Outcome, RegistryState, check_night
from benchmarks.month.nights import (
    BAD,
    CRASHES,
    FIRST_PRODUCTS,
    GOOD,
    STRIKES,
    UNDONE,
    Night,
    Source,
    Strike,
    plan_month,
    products_of,
)
from benchmarks.month.report import (
    NightResult,
    account,
    passed,
    print_summary,
    summarise,
    trained_seconds,
    useful_share,
)

SEEDS = range(10)
TODAY = datetime(2026, 11, 26, 12, tzinfo=UTC)


def test_a_month_has_every_kind_of_night_and_every_fault() -> None:
    """Whatever the seed; the same seed gives the same month."""
    for seed in SEEDS:
        nights = plan_month(30, seed, TODAY)
        assert nights == plan_month(30, seed, TODAY)
        kinds = Counter(night.kind for night in nights)
        assert nights[0].kind == "good"
        assert sum(kinds[kind] for kind in GOOD) == 9
        assert sum(kinds[kind] for kind in BAD) == 9
        assert all(kinds[kind] for kind in (*GOOD, *BAD, "nothing"))
        assert {name for night in nights for name in night.faults} == {*STRIKES, *UNDONE}
        assert [night.date for night in nights][-2:] == ["2026-11-25", "2026-11-26"]


def test_faults_strike_nights_that_they_can_strike() -> None:
    """Two a night at most, and one that crashes the run; what is left undone is caught up alone."""
    for seed in SEEDS:
        nights = plan_month(30, seed, TODAY)
        for before, night in zip([None, *nights], nights, strict=False):
            names = night.faults
            assert len(names) == len(set(names)) <= 2
            assert sum(name in CRASHES for name in names) <= 1
            assert all(night.kind in STRIKES[strike.name] for strike in night.strikes)
            assert night.catches_up == bool(before and before.undone)
            if night.catches_up:
                assert (night.kind, names) == ("nothing", ())


def test_the_source_counts_its_lines_and_takes_bad_files_back(tmp_path: Path) -> None:
    """Good rows stay and are right, broken lines are no rows, and no file is forgotten."""
    nights = plan_month(30, 0, TODAY)
    source = Source(tmp_path / "data", tmp_path / "dev.jsonl", products_of(nights), seed=0)
    asked = {row["question"] for row in clean_rows("test", products_of(nights))}
    right: set[str] = set()
    for night in nights:
        source.write(night)
        files = sorted((tmp_path / "data").iterdir())
        lines = [line for file in files for line in _lines(file)]
        broken = [line for line in lines if not _question(line)]
        dev = _lines(source.dev)
        assert (len(lines) + len(dev), len(broken)) == source.totals()
        assert (len(broken) > 0) == (night.kind == "truncated" or _has_malformed(source))
        new = {line for line in lines if _question(line)}
        if night.kind in GOOD:
            assert right < new
            right = new
        elif night.kind in ("shuffled", "garbage", "language"):
            assert len(new - right) > 0.5 * len(right)
        else:
            assert new == right
        assert not asked & {_question(line) for line in (*new, *dev)}
    assert len(products_of(nights)) == FIRST_PRODUCTS + 8


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _question(line: str) -> str:
    try:
        return str(json.loads(line)["question"])
    except (ValueError, TypeError):
        return ""


def _has_malformed(source: Source) -> bool:
    return any(broken for _, broken in source.lines.values())


# --- the checks, against what they have to find ---

GOOD_NIGHT = Night(2, TODAY, "good")
BEFORE = RegistryState(
    "1", {"1": "r1"}, ({"number": 1, "version": "1", "replaced": None, "state": "done"},)
)
MOVE = {"number": 2, "version": "2", "replaced": "1", "state": "done"}
PROMOTED = RegistryState("2", {"1": "r1", "2": "r2"}, (*BEFORE.moves, MOVE))


def flow_run(message: str, name: str = "Completed", kind: str = "COMPLETED") -> dict[str, Any]:
    return {"state_name": name, "state_type": kind, "state": {"message": message}}


def outcome(*runs: dict[str, Any]) -> Outcome:
    return Outcome(list(runs), [Path("runs/r2")])


def test_a_night_as_it_should_be_has_no_problems() -> None:
    """Promoted, kept, a bad one kept, one that crashed and was resumed, nothing new."""
    done = outcome(flow_run("promoted: better"))
    crashed = flow_run("killed", "Crashed", "CRASHED")
    kept = RegistryState("1", {"1": "r1", "2": "r2"}, BEFORE.moves)
    assert check_night(GOOD_NIGHT, None, BEFORE, PROMOTED, done) == []
    assert check_night(GOOD_NIGHT, None, BEFORE, kept, outcome(flow_run("kept: no better"))) == []
    resumed = outcome(crashed, flow_run("promoted: better"))
    assert check_night(GOOD_NIGHT, None, BEFORE, PROMOTED, resumed) == []
    bad = Night(2, TODAY, "garbage")
    assert check_night(bad, None, BEFORE, kept, outcome(flow_run("kept: worse"))) == []
    idle = Outcome([flow_run("", "Nothing new")], [])
    assert check_night(Night(2, TODAY, "nothing"), None, BEFORE, BEFORE, idle) == []


@pytest.mark.parametrize(
    ("night", "after", "runs", "problem"),
    [
        (
            GOOD_NIGHT,
            BEFORE,
            [flow_run("promoted: x")],
            "verdict 'promoted', but the champion is 1",
        ),
        (GOOD_NIGHT, PROMOTED, [flow_run("kept: x")], "verdict 'kept', but the champion is 1->2"),
        (Night(2, TODAY, "garbage"), PROMOTED, [flow_run("promoted: x")], "a garbage night made 2"),
        (GOOD_NIGHT, BEFORE, [flow_run("x", "Crashed", "CRASHED")], "ended 'crashed'"),
        (Night(2, TODAY, "nothing"), BEFORE, [flow_run("kept: x")], "ended 'kept' instead of"),
        (
            GOOD_NIGHT,
            RegistryState("2", {"1": "r1", "2": "r2", "3": "r2"}, PROMOTED.moves),
            [flow_run("promoted: x")],
            "registered twice",
        ),
        (
            GOOD_NIGHT,
            RegistryState(
                "2", PROMOTED.runs, (*PROMOTED.moves, {**MOVE, "number": 3, "replaced": "2"})
            ),
            [flow_run("promoted: x")],
            "promoted twice",
        ),
        (
            GOOD_NIGHT,
            RegistryState("2", PROMOTED.runs, (*BEFORE.moves, {**MOVE, "state": "begun"})),
            [flow_run("promoted: x")],
            "begun and not finished",
        ),
        (
            GOOD_NIGHT,
            RegistryState("2", {"2": "r2"}, PROMOTED.moves),
            [flow_run("promoted: x")],
            "versions ['1'] are gone",
        ),
        (
            GOOD_NIGHT,
            RegistryState("2", {"1": "r1", "2": "stranger"}, PROMOTED.moves),
            [flow_run("promoted: x")],
            "not this night's",
        ),
    ],
)
def test_what_is_wrong_with_a_night_is_found(
    night: Night, after: RegistryState, runs: list[dict[str, Any]], problem: str
) -> None:
    """Lost, duplicate, foreign or false promotions, and wrong ends of nights."""
    found = check_night(night, None, BEFORE, after, outcome(*runs))
    assert any(problem in line for line in found), found


def test_a_second_start_that_did_the_work_again_is_found() -> None:
    """It has to end at once."""
    night = Night(2, TODAY, "good", strikes=[Strike("double start", 0.5)])
    again = outcome(flow_run("promoted: x"), flow_run("kept: x"))
    found = check_night(night, None, BEFORE, PROMOTED, again)
    assert any("1 more starts, 0 ended at once" in line for line in found), found


# --- the time ---


def write_attempt(run: Path, number: int, first: int, last: int, resumed: str | None) -> Path:
    """Write an attempt whose steps took a second each."""
    attempt = run / "attempts" / f"{number:02d}"
    attempt.mkdir(parents=True)
    times = [TODAY + timedelta(seconds=1000 * number + step) for step in range(last + 1)]
    lines = [
        json.dumps({"step": step, "timestamp": times[step].isoformat()})
        for step in range(first, last + 1)
    ]
    (attempt / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "ti']))
    (attempt / "plan.json").write_text(json.dumps({"resume_from": resumed}))
    return attempt


def test_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    """Killed at step 50, gone on from the checkpoint of step 40: 100 steps, not 110."""
    killed = write_attempt(tmp_path, 1, 0, 50, None)
    assert trained_seconds(tmp_path) == 0.0
    checkpoint = str(killed / "checkpoints" / "step-000040")
    last = write_attempt(tmp_path, 2, 40, 100, checkpoint)
    (last / "outcome.json").touch()
    assert trained_seconds(tmp_path) == pytest.approx(100.0)


def result(total: float, trained: float, verdict: str, faults: list[str]) -> NightResult:
    night = NightResult(1, "", "good", faults, [], verdict=verdict)
    night.total_seconds, night.trained_seconds = total, trained
    return night


def test_what_is_lost_is_what_undisturbed_nights_do_not_take() -> None:
    """A deferred night that is trained again is lost; the cost is unknown without a calm night.

    A night that finishes the work of the one before makes that one useful; one that trains for it
    does the work of both.
    """
    calm, struck = result(60, 30, "promoted", []), result(90, 30, "kept", ["nan"])
    useless = result(50, 30, "deferred", ["tracking down"])
    nights = [calm, struck, useless]
    account(nights)
    assert [night.useful_seconds for night in nights] == [60, 60, 0]
    assert useful_share(nights) == pytest.approx(120 / 200)
    ended = result(25, 0, "promoted", [])
    ended.catches_up = True
    account(nights := [calm, useless, ended, result(10, 0, "nothing new", [])])
    assert [night.useful_seconds for night in nights] == [60, 50, 10, 10]
    off, both = result(0, 0, "not started", ["machine off"]), result(95, 40, "promoted", [])
    both.catches_up = True
    account(nights := [calm, off, both, result(10, 0, "nothing new", [])])
    assert [night.useful_seconds for night in nights] == [60, 0, 80, 10]
    account([struck])
    assert useful_share([struck]) is None


def test_the_summary_can_be_printed_from_the_first_night_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It prints with faults of unknown cost; a problem or a missing night fails the month."""
    first = result(300, 30, "promoted", ["power cut"])
    print_summary(summarise([first], 2), [first])
    assert "useful time: unknown" in capsys.readouterr().out
    assert not passed(summarise([first], 2))
    assert passed(summarise([first], 1))
    first.problems.append("champion 1 cannot be used")
    assert not passed(summarise([first], 1))
    calm, slow = result(60, 30, "promoted", []), result(70, 30, "kept", ["nan"])
    assert not passed(summarise([calm, slow], 2))  # 120 of 130 s
    assert passed(summarise([calm, slow], 2, least_share=0.9))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_short_month_passes(tmp_path: Path) -> None:
    """Three nights on a real stack: a good one, a bad one and one without news, with two faults."""
    out = tmp_path / "month.json"
    quick = ["--nights", "3", "--seed", "1", "--steps", "300", "--least-share", "0.5"]
    assert month.main([*quick, "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    assert (kept["nights"], kept["interventions"], kept["problems"]) == (3, [], [])
