"""Every point at which something is committed can be struck, and leaves the old or the new."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from support.killed import killed
from support.registered import MODEL, add_version, copy_database
from test_contracts import MODULES

from benchmarks.kills.strikes import POINTS as TRAINING_POINTS
from qwen3ft import faults
from qwen3ft.disk import manifests
from qwen3ft.disk.files import write_json_atomic
from qwen3ft.disk.manifests import build_folder, find_damage, is_left_behind
from qwen3ft.errors import ConfigError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.registry import aliases
from qwen3ft.registry.moves import Aliases, Change, Mover
from qwen3ft.registry.registry import Registry
from qwen3ft.registry.versions import find_or_create_version
from qwen3ft.tracking.connection import connect
from qwen3ft.tracking.cursor import operations, outstanding, parent_run_id
from qwen3ft.tracking.journal import Journal
from qwen3ft.tracking.sender import Sender

FILE_POINTS = {"file.written": "old", "file.synced": "old", "file.renamed": "new"}
FOLDER_POINTS = {
    "folder.filled": "old",
    "folder.listed": "old",
    "folder.exchanged": "new",
    "folder.renamed": "new",
}
RETIRED = "folder.retired"
MOVE_POINTS = {"move.begun": "1", "move.prepared": "1", "move.made": "2"}
"""Point: the champion after the crash is settled."""

OTHERS = ("journal.appended", "cursor.sent", "version.created")
ANSWERS = "answers.begun"  # in tests/evaluation/test_decoded.py
NIGHT = Change(by=Mover(kind="flow", name="run-x"))


def test_every_point_is_in_the_code_once_and_in_a_test() -> None:
    """The list has no point that is never passed, and the code none that is not listed.

    Those of a training are struck in `tests/training/test_interruptions.py`, that of answers in
    `tests/evaluation/test_decoded.py`, all others here.
    """
    called: Counter[str] = Counter()
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "reach":
                assert isinstance(node.args[0], ast.Constant), path
                called[node.args[0].value] += 1
    assert called == Counter(faults.POINTS.keys())
    struck = {
        *TRAINING_POINTS,
        *FILE_POINTS,
        *FOLDER_POINTS,
        *MOVE_POINTS,
        *OTHERS,
        RETIRED,
        ANSWERS,
    }
    assert struck == set(faults.POINTS)


@pytest.mark.parametrize(("point", "left"), FILE_POINTS.items())
def test_a_process_killed_at_a_point_of_a_file_leaves_the_old_or_the_new(
    tmp_path: Path, point: str, left: str
) -> None:
    """Never half of one."""
    path = tmp_path / "value.json"
    write_json_atomic(path, "old")
    killed(lambda: write_json_atomic(path, "new"), point)
    assert path.read_text(encoding="utf-8") == f'"{left}"\n'


@pytest.mark.parametrize(("point", "left"), FOLDER_POINTS.items())
def test_a_process_killed_at_a_point_of_a_folder_leaves_the_old_or_the_new(
    tmp_path: Path, point: str, left: str
) -> None:
    """One of them has the name at any time."""
    target = tmp_path / "folder"

    def build(content: str) -> None:
        build_folder(target, lambda folder: write_json_atomic(folder / "value.json", content))

    build("old")
    killed(lambda: build("new"), point)
    assert find_damage(target) is None
    assert (target / "value.json").read_text(encoding="utf-8") == f'"{left}"\n'
    assert all(is_left_behind(path) for path in tmp_path.glob(".folder.*"))
    build("newer")
    assert (target / "value.json").read_text(encoding="utf-8") == '"newer"\n'


def test_where_folders_cannot_be_exchanged_the_older_one_is_kept_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames, neither has the name; the older one is not thrown away."""
    monkeypatch.setattr(manifests, "_exchange", lambda _one, _other: False)
    target = tmp_path / "folder"

    def build(content: str) -> None:
        build_folder(target, lambda folder: write_json_atomic(folder / "value.json", content))

    build("old")
    killed(lambda: build("new"), RETIRED)
    assert not target.exists()
    [retired] = tmp_path.glob(".folder.old.*")
    assert not is_left_behind(retired)
    assert find_damage(retired / "folder") is None
    build("newer")
    assert (target / "value.json").read_text(encoding="utf-8") == '"newer"\n'


def test_a_process_killed_after_an_operation_was_journaled_repeats_nothing_in_mlflow(
    migrated_database: Path, tmp_path: Path
) -> None:
    """The line is there; sent and not remembered as sent, it is sent again and is there once."""
    uri, run = copy_database(migrated_database, tmp_path), RunDir(tmp_path / "runs" / "run-1")
    journal = Journal(run)
    journal.run_started("run-1", {}, {})
    killed(lambda: journal.tags({"a": 1}), "journal.appended")
    assert [operation.kind for operation in operations(run)] == ["run_started", "tags"]
    for _ in range(2):
        killed(lambda: Sender(run, uri).send_all(), "cursor.sent")
        assert outstanding(run) == 2
    Sender(run, uri).send_all()
    assert outstanding(run) == 0
    found = connect(uri).client.search_runs(["0", "1"])
    assert [one.info.run_id for one in found] == [parent_run_id(run)]
    assert found[0].data.tags["a"] == "1"


@pytest.fixture
def versions(migrated_database: Path, tmp_path: Path) -> str:
    """Address of a database with two versions, of which the first is in use."""
    uri = copy_database(migrated_database, tmp_path)
    for night in (1, 2):
        add_version(uri, tmp_path, f"night-{night}")
    Registry(uri).promote(MODEL, "1", None, NIGHT)
    return uri


@pytest.mark.parametrize(("point", "champion"), MOVE_POINTS.items())
def test_a_crash_at_a_point_of_a_move_leaves_it_undone_or_done(
    versions: str, monkeypatch: pytest.MonkeyPatch, point: str, champion: str
) -> None:
    """Once settled, aliases and history agree."""
    connection = connect(versions)
    monkeypatch.setenv(faults.VARIABLE, f"error@point={point}")
    with pytest.raises(ValueError, match="planted"):
        aliases.make_champion(connection, MODEL, "2", "1", NIGHT)
    monkeypatch.delenv(faults.VARIABLE)
    history = aliases.settle(connection, MODEL)
    made = champion == "2"
    assert history.aliases == Aliases(champion=champion, previous="1" if made else None)
    assert [move.version for move in history.moves] == (["1", "2"] if made else ["1"])


def test_a_crash_after_a_version_was_made_makes_no_second_one(
    versions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same adapter of the same run is found again."""
    connection = connect(versions)
    run_id = connection.client.get_model_version(MODEL, "1").run_id
    tags = {aliases.DIGEST_TAG: "another"}
    monkeypatch.setenv(faults.VARIABLE, "error@point=version.created")
    with pytest.raises(ValueError, match="planted"):
        find_or_create_version(connection, MODEL, run_id, tags)
    assert find_or_create_version(connection, MODEL, run_id, tags) == "3"
    assert len(connection.client.search_model_versions(f"name = '{MODEL}'")) == 3


@pytest.mark.parametrize(
    "text", ["kill@point=nowhere", "oom@point=file.written", "kill@point=file.written:hit=x", "x"]
)
def test_a_fault_that_is_not_understood_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """A typo is an error, not a campaign without faults; the message lists the points."""
    monkeypatch.setenv(faults.VARIABLE, text)
    with pytest.raises(ConfigError, match=r"folder\.renamed"):
        faults.planted_faults()


def test_a_point_is_struck_at_the_visit_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Earlier and later visits pass."""
    monkeypatch.setattr(faults, "_reached", Counter())
    monkeypatch.setenv(faults.VARIABLE, "full@point=file.renamed:hit=2")
    write_json_atomic(tmp_path / "a", 1)
    with pytest.raises(OSError, match="No space left on device"):
        write_json_atomic(tmp_path / "b", 1)
    write_json_atomic(tmp_path / "c", 1)
