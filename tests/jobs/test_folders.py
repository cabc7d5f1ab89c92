"""The folders of a run: any number of attempts, and no line lost for want of a newline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.finished_run import make_outcome

from qwen3ft.disk.files import append_json_line, read_json_lines
from qwen3ft.jobs.folders import RunDir, read_records, write_record
from qwen3ft.records.training import MemoryStatus, TrainingMetrics
from qwen3ft.registry.moves import Move, Mover, from_tags, to_tag
from qwen3ft.training import checkpoint
from tasks.train import finished_attempt

MEMORY = MemoryStatus(allocated_gb=1.0, cached_gb=1.0, total_gb=4.0, available_gb=3.0, is_safe=True)


@pytest.mark.parametrize("most", [9, 99, 100, 101, 1001])
def test_attempts_of_any_number_are_seen_in_order(tmp_path: Path, most: int) -> None:
    """Past 99, and past 999, they are listed by number; other folders are none."""
    run = RunDir(tmp_path)
    assert run.attempts() == []
    assert run.next_attempt() == 1
    for number in range(1, most + 1):
        run.attempt(number).path.mkdir(parents=True)
    for other in ("1", "007", ".01.removed", "01.old", "x"):
        (tmp_path / "attempts" / other).mkdir(exist_ok=True)
    assert [int(job.path.name) for job in run.attempts()] == list(range(1, most + 1))
    assert run.next_attempt() == most + 1


def test_the_attempt_after_a_missing_one_has_a_number_of_its_own(tmp_path: Path) -> None:
    """Numbers are not counts: a removed folder does not lead back into one that exists."""
    run = RunDir(tmp_path)
    for number in (1, 3, 100):
        run.attempt(number).path.mkdir(parents=True)
    assert run.next_attempt() == 101


def test_a_run_of_more_than_99_attempts_goes_on_and_ends(make_plan: Any, tmp_path: Path) -> None:
    """It resumes from the newest checkpoint of all attempts, and finds its outcome."""
    plan = make_plan()
    run = RunDir(Path(plan.run_dir))
    for number in (1, 98, 99, 100, 123):
        job = run.attempt(number).create(plan)
        write = lambda folder: (folder / "w").write_bytes(b"w")  # noqa: E731
        checkpoint.commit(job.checkpoints, number, write, checkpoint.lineage(plan))
    assert run.next_attempt() == 124
    folders = [job.checkpoints for job in run.attempts()]
    newest = checkpoint.newest_verified(folders, checkpoint.lineage(plan))
    assert newest is not None
    assert newest.path == run.attempt(123).checkpoints / "step-000123"
    assert finished_attempt(run, plan) is None
    outcome = make_outcome(run.attempt(123).checkpoints / "step-000123")
    write_record(run.attempt(123).outcome, outcome)
    assert finished_attempt(run, plan) == outcome


def test_steps_and_moves_of_any_number_are_in_order(tmp_path: Path) -> None:
    """Seven digits come after six, in checkpoints as in the registry's history."""
    steps = [999_999, 1_000_000, 10_000_000]
    for step in steps:
        checkpoint.commit(tmp_path, step, lambda folder: None, {})
    assert [one.step for one in checkpoint.list_checkpoints([tmp_path])] == steps
    mover = Mover(kind="flow", name="run")
    moves = [Move(number=step, action="promotion", version="1", by=mover) for step in steps]
    tags = dict(map(to_tag, reversed(moves)))
    assert [move.number for move in from_tags(tags)] == steps


def line(step: int) -> dict[str, Any]:
    """Return a line of metrics.jsonl."""
    metrics = TrainingMetrics(epoch=0.0, step=step, learning_rate=0.1, memory_usage=MEMORY)
    return metrics.model_dump(mode="json")


def test_a_last_line_without_its_newline_counts_if_it_is_whole(tmp_path: Path) -> None:
    """Cut off after the last brace it is read; cut off before, it is said to be skipped."""
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        append_json_line(path, line(step))
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert [one.step for one in read_records(path, TrainingMetrics)] == [1, 2]
    assert [one["step"] for one in read_json_lines(path)] == [1, 2]
    append_json_line(path, line(3))
    assert [one.step for one in read_records(path, TrainingMetrics)] == [1, 2, 3]
    path.write_bytes(content[:-2])
    assert [one.step for one in read_records(path, TrainingMetrics)] == [1]
    append_json_line(path, line(3))
    assert [one.step for one in read_records(path, TrainingMetrics)] == [1, 3]


def test_a_cut_off_last_line_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is dropped silently; a broken line before the last is an error."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": ')
    assert read_json_lines(path) == [{"n": 1}]
    assert f"the last line of {path} is cut off and skipped" in caplog.text
    path.write_bytes(b'{"n": \n{"n": 1}')
    with pytest.raises(ValueError, match="Expecting value"):
        read_json_lines(path)


def test_an_ability_set_without_a_last_newline_is_read_whole(
    make_config: Any, tmp_path: Path
) -> None:
    """Editors leave it out; the last row counts as any other."""
    from qwen3ft.evaluation.ability import read_ability_rows

    path = tmp_path / "ability.jsonl"
    row = '{"question": "What is 2 + 2?", "answer": "4"}'
    path.write_text(f"{row}\n{row}", encoding="utf-8")
    assert len(read_ability_rows(make_config(ability_path=str(path)))) == 2
