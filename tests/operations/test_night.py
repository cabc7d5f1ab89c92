"""A night is done once, however often it is started; an unfinished one is resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.night import (
    DEFERRED,
    REQUEST_TAG,
    SETTINGS_TAG,
    SETTINGS_THAT_DO_NOT_DECIDE,
    NightRequest,
    claim_night,
    describe_request,
    is_answered_by,
    kept_before,
    nights_folder,
    request_tags,
    same_settings,
    write_request,
)

REQUEST = NightRequest(sha256="a" * 64, settings_sha256="c" * 64, files=1)
OTHER = NightRequest(sha256="b" * 64, settings_sha256="d" * 64, files=1)
DATE = "2026-11-26"


def config(tmp_path: Path, **changes: Any) -> TrainingConfig:
    values = {"model_name": "embedded", "cache_dir": str(tmp_path / "cache")}
    return TrainingConfig(**{**values, **changes})


# --- what is asked for ---


def test_settings_that_do_not_decide_are_settings() -> None:
    """A misspelt name would be ignored silently."""
    assert set(TrainingConfig.model_fields) >= SETTINGS_THAT_DO_NOT_DECIDE


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"runs_dir": "elsewhere", "max_memory_gb": 6.0, "kernels": "plain"}, True),
        ({"judge_url": "http://localhost/v1", "judge_model": "m", "judge_rows": 9}, True),
        ({"batch_size": 8, "gradient_accumulation_steps": 8}, True),
        ({"batch_size": 8}, False),
        ({"learning_rate": 1e-3}, False),
        ({"seed": 1}, False),
        ({"max_sequence_length": 512}, False),
    ],
)
def test_only_what_decides_the_result_makes_another_request(
    tmp_path: Path, changes: dict[str, Any], same: bool
) -> None:
    """The machine's settings do not; the effective batch does, not its two factors."""
    first = describe_request(config(tmp_path))
    assert (describe_request(config(tmp_path, **changes)) == first) is same


def test_the_content_of_the_data_folder_decides_and_its_times_do_not(tmp_path: Path) -> None:
    """A new file, a new line or a new name is another request; `touch` is not."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = folder / "a.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n')
    asked = config(tmp_path, data_paths=(str(folder),))
    first = describe_request(asked)
    os.utime(rows, (1, 1))
    assert describe_request(asked) == first
    (folder / "b.jsonl").write_text('{"question": "r", "answer": "b"}\n')
    second = describe_request(asked)
    assert second.files == 2
    assert second.settings_sha256 == first.settings_sha256
    rows.write_text('{"question": "q", "answer": "A"}\n')
    assert len({first.sha256, second.sha256, describe_request(asked).sha256}) == 3


def test_the_request_is_found_without_torch_and_without_a_process(tmp_path: Path) -> None:
    """Only digests and settings are compared."""
    program = (
        "import subprocess, sys\n"
        "def refuse(*a, **k): raise AssertionError('a process was started')\n"
        "subprocess.Popen.__init__ = refuse\n"
        "from qwen3ft.config import TrainingConfig\n"
        "from qwen3ft.operations.night import describe_request\n"
        f"describe_request(TrainingConfig(model_name='embedded', cache_dir={str(tmp_path)!r}))\n"
        "print(sorted({'torch', 'transformers', 'pynvml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_version_answers_the_request_it_was_tagged_with(tmp_path: Path) -> None:
    """The tag goes through the run's folder; a run without a request gives no tag."""
    run = RunDir(tmp_path)
    assert request_tags(run) == {}
    assert not is_answered_by({}, REQUEST)
    write_request(run, REQUEST)
    assert request_tags(run) == {REQUEST_TAG: "a" * 64, SETTINGS_TAG: "c" * 64}
    assert is_answered_by(request_tags(run), REQUEST)
    assert same_settings(request_tags(run), REQUEST)
    assert not same_settings(request_tags(run), OTHER)
    assert same_settings({}, OTHER)  # of a version that is older than the tag nothing is known
    assert not is_answered_by(request_tags(run), OTHER)


# --- whose night it is ---


def test_a_night_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    """The second start learns which run did it; another date or request is another night."""
    with claim_night(tmp_path, DATE, REQUEST, "one") as night:
        assert (night.run_id, night.taken, night.again) == ("one", None, False)
        night.settle("promoted", "3")
    with claim_night(tmp_path, DATE, REQUEST, "two") as night:
        assert (night.run_id, night.taken) == ("one", "already done by run one")
    with claim_night(tmp_path, "2026-11-27", REQUEST, "three") as night:
        assert night.taken is None
    with claim_night(tmp_path, DATE, OTHER, "four") as night:
        assert night.taken is None


def test_a_failed_night_is_taken_up_by_the_next_start(tmp_path: Path) -> None:
    """It gets the failed run's id, so that its checkpoints are found."""
    with pytest.raises(ValueError), claim_night(tmp_path, DATE, REQUEST, "one"):
        raise ValueError
    with claim_night(tmp_path, DATE, REQUEST, "two") as night:
        assert (night.run_id, night.taken, night.again) == ("one", None, True)


def test_a_deferred_night_is_taken_up_by_the_next_one_that_asks_for_the_same(
    tmp_path: Path,
) -> None:
    """Its adapter is trained; once it has a verdict, no later night returns to it."""
    with claim_night(tmp_path, DATE, REQUEST, "one") as night:
        night.settle(DEFERRED)
    with claim_night(tmp_path, "2026-11-27", OTHER, "two") as night:
        assert (night.run_id, night.again) == ("two", False)
    with claim_night(tmp_path, "2026-11-27", REQUEST, "three") as night:
        assert (night.run_id, night.taken, night.again) == ("one", None, True)
        night.settle(DEFERRED)
    with claim_night(tmp_path, "2026-11-28", REQUEST, "four") as night:
        assert (night.run_id, night.again) == ("one", True)
        night.settle("promoted", "7")
    for date in (DATE, "2026-11-28"):
        with claim_night(tmp_path, date, REQUEST, "five") as night:
            assert night.taken == "already done by run one"


def test_a_failed_night_is_no_matter_of_later_nights(tmp_path: Path) -> None:
    """The cause may be in its folder, so another night starts afresh."""
    with pytest.raises(ValueError), claim_night(tmp_path, DATE, REQUEST, "one"):
        raise ValueError
    with claim_night(tmp_path, "2026-11-27", REQUEST, "two") as night:
        assert (night.run_id, night.again) == ("two", False)


def test_a_night_whose_process_was_killed_is_taken_up(tmp_path: Path) -> None:
    """While it runs, a second start learns its id; after SIGKILL the lock is free."""
    program = (
        "import sys, time; from pathlib import Path; from qwen3ft.operations.night import *\n"
        "request = NightRequest(sha256='a' * 64, settings_sha256='c' * 64, files=1)\n"
        "with claim_night(Path(sys.argv[1]), sys.argv[2], request, 'one'):\n"
        "    print('mine', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), DATE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    with claim_night(tmp_path, DATE, REQUEST, "two") as night:
        assert night.taken == "in progress as run one"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claim_night(tmp_path, DATE, REQUEST, "two") as night:
        assert (night.run_id, night.taken, night.again) == ("one", None, True)


def _start(folder: Path, number: int, barrier: Any, done: Any) -> None:
    barrier.wait()
    with claim_night(folder, DATE, REQUEST, f"run-{number}") as night:
        if night.taken is None:
            time.sleep(0.05)
            done.put(night.run_id)
            night.settle("kept", "1")


def test_starts_at_the_same_moment_do_the_night_once(tmp_path: Path) -> None:
    """Of eight processes one gets the night; the others end at once."""
    fork = multiprocessing.get_context("fork")
    barrier, done = fork.Barrier(8), fork.Queue()
    starts = [
        fork.Process(target=_start, args=(tmp_path, number, barrier, done)) for number in range(8)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    first = done.get(timeout=5)
    assert done.empty()
    [record] = nights_folder(tmp_path).glob("*.json")
    assert json.loads(record.read_text())["run_id"] == first


def test_a_damaged_record_is_a_night_that_was_left_undone(tmp_path: Path) -> None:
    """Half a file, or one of another version, costs a run but never a night."""
    with claim_night(tmp_path, DATE, REQUEST, "one") as night:
        night.settle("promoted")
    [record] = nights_folder(tmp_path).glob("*.json")
    record.write_text('{"date": ')
    with claim_night(tmp_path, DATE, REQUEST, "two") as night:
        assert (night.run_id, night.taken) == ("two", None)


def test_a_candidate_that_lost_is_remembered_while_the_champion_stays(tmp_path: Path) -> None:
    """The same request against the same champion would lose again; against another it may not."""
    with claim_night(tmp_path, DATE, REQUEST, "one") as night:
        night.settle("kept", "3")
    found = kept_before(tmp_path, REQUEST, "3")
    assert found is not None
    assert found.run_id == "one"
    assert kept_before(tmp_path, REQUEST, "4") is None
    assert kept_before(tmp_path, OTHER, "3") is None
    assert kept_before(tmp_path, REQUEST, None) is None


def test_a_candidate_that_lost_to_the_base_is_remembered_while_nothing_is_in_use(
    tmp_path: Path,
) -> None:
    """Otherwise a first candidate that fails would be trained again every night."""
    with claim_night(tmp_path, DATE, REQUEST, "one") as night:
        night.settle("kept", None)
    assert kept_before(tmp_path, REQUEST, None) is not None
    assert kept_before(tmp_path, REQUEST, "1") is None


def test_a_request_knows_its_registered_model_and_ability_rows(tmp_path: Path) -> None:
    """Two deployments with the same data do not share a night; edited rows may change a verdict."""
    rows = tmp_path / "ability.jsonl"
    rows.write_text('{"question": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
    first = describe_request(config(tmp_path, ability_path=str(rows)))
    other = config(tmp_path, ability_path=str(rows), name="another")
    assert describe_request(other).sha256 != first.sha256
    rows.write_text('{"question": "1 + 1?", "answer": "two"}\n', encoding="utf-8")
    assert describe_request(config(tmp_path, ability_path=str(rows))).sha256 != first.sha256
