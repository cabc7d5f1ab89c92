"""A line of the journal that was changed after it was written is found, named and left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3ft.config import TrainingConfig
from qwen3ft.jobs.folders import RunDir
from qwen3ft.report.build import RunFacts, build_card
from qwen3ft.report.facts import card_facts
from qwen3ft.tracking.cursor import find_damaged_lines, operations, parent_run_id
from qwen3ft.tracking.journal import Journal, Operation, Tags, journal_path
from qwen3ft.tracking.mirror import replay_unsent
from qwen3ft.tracking.sender import Sender


@pytest.fixture
def written(run_dir: RunDir) -> RunDir:
    """A run with a journal of four lines."""
    journal = Journal(run_dir)
    journal.run_started("run-1", {"rate": 0.25}, {})
    for number in (1, 2):
        journal.tags({f"tag-{number}": "as written"})
    journal.run_finished("FINISHED")
    return run_dir


def tags_of(run_dir: RunDir) -> list[str]:
    """Return the names of the tags that readers of the journal see."""
    found = (operation for operation in operations(run_dir) if isinstance(operation, Tags))
    return [name for tags in found for name in tags.values]


def test_a_change_of_any_byte_is_found(written: RunDir) -> None:
    """Each byte of the second line in turn, whether the JSON stays readable or not."""
    path = journal_path(written)
    content = path.read_bytes()
    first, second, *_ = content.splitlines(keepends=True)
    assert find_damaged_lines(written) == ()
    for position in range(len(first), len(first) + len(second) - 1):
        changed = bytearray(content)
        changed[position] = ord("0") if changed[position] != ord("0") else ord("1")
        path.write_bytes(changed)
        assert find_damaged_lines(written) == (2,), changed[len(first) :][: len(second)]
        assert tags_of(written) == ["tag-2"]


@pytest.mark.parametrize(
    "replaced",
    [
        b'{"kind":"tags","values":{"tag-1":"forged"}}\n',
        b'{"kind":"tags","values":{"tag-1":"forged"},"crc32":"00000000"}\n',
        b'{"kind":"tags","values":{"tag-1":"forged"},"crc32":"00000000"}  \n',
        b'{"kind":"tags","va\n',
        b"\xff\xfe\n",
        b"\n",
    ],
)
def test_a_line_that_was_replaced_or_cut_off_is_found(written: RunDir, replaced: bytes) -> None:
    """With another checksum, without one, cut off or empty."""
    lines = journal_path(written).read_bytes().splitlines(keepends=True)
    lines[1] = replaced
    journal_path(written).write_bytes(b"".join(lines))
    assert find_damaged_lines(written) == (2,)
    assert tags_of(written) == ["tag-2"]


def test_the_log_names_the_line_and_the_card_counts_it(
    written: RunDir, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Number and place of the line, and what was done; the rest is sent."""
    from qwen3ft.tracking.connection import connect

    path = journal_path(written)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"as written", b"as changed")
    path.write_bytes(b"".join(lines))
    Sender(written, database).send_all()
    start = len(lines[0])
    expected = f"Line 2 of {path} (byte {start}) is skipped: it does not match its checksum."
    assert expected in caplog.text
    run_id = parent_run_id(written)
    assert run_id is not None
    run = connect(database).client.get_run(run_id)
    assert run.data.tags["tag-2"] == "as written"
    assert "tag-1" not in run.data.tags
    assert run.info.status == "FINISHED"
    facts = RunFacts(TrainingConfig(model_name="embedded"), "run-1")
    facts.error, facts.damaged_lines = ValueError("x"), find_damaged_lines(written)
    (shown,) = (fact for fact in card_facts(build_card(facts)) if fact.label == "journal")
    assert shown.value == "1 damaged line of tracking.jsonl skipped: 2"


def test_a_journal_of_an_earlier_version_is_read_and_continued(run_dir: RunDir) -> None:
    """Its lines have no checksums; those that are added have, and a change of these is found."""
    path = journal_path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    old: list[Operation] = [Tags(values={"old-1": "x"}), Tags(values={"old-2": "x"})]
    path.write_text("".join(f"{one.model_dump_json()}\n" for one in old), encoding="utf-8")
    Journal(run_dir).tags({"new": "x"})
    assert tags_of(run_dir) == ["old-1", "old-2", "new"]
    assert find_damaged_lines(run_dir) == ()
    *_, last = path.read_bytes().splitlines()
    assert json.loads(last)["values"] == {"new": "x"}  # earlier versions read it too
    path.write_bytes(path.read_bytes().replace(b'"new":"x"', b'"new":"y"'))
    assert tags_of(run_dir) == ["old-1", "old-2"]
    assert find_damaged_lines(run_dir) == (3,)


def test_the_end_of_a_run_counts_without_its_newline(
    written: RunDir, database: str, tmp_path: Path
) -> None:
    """A run whose last line lost only its newline did finish, and is not closed as killed."""
    from qwen3ft.tracking.connection import connect

    path = journal_path(written)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert replay_unsent(written.path.parent, database) == 0
    run_id = parent_run_id(written)
    assert run_id is not None
    assert connect(database).client.get_run(run_id).info.status == "FINISHED"
