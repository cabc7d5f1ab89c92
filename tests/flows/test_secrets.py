"""Keys in every field of every input of a run: no page, log, journal or database has one."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from support.flow_project import FlowProject
from support.planted_keys import KEYS
from support.resumed_run import Resumed

KEEPS_IT = {
    r"cache/datasets/\w+/(train|dev)\.arrow": "tokens to train on, with the text of their question",
    r"cache/datasets/\w+/test\.jsonl": "questions that the models are asked",
    r"cache/answers/.*": "answers of the base model to them, to be scored",
    r"runs/[^/]+/jobs/inference/answers\.jsonl": "answers, to be scored and judged",
    r"runs/[^/]+/jobs/inference/outcome\.json": "a few of them, which the card shows masked",
}
"""Files of the run that hold rows as they are, with the reason; only their owner can read them."""

SETTINGS = {"folder", "file", "bad file", "column", "separator"}
"""Places whose keys are part of a setting or path: what a run needs to be continued holds them."""

KEEPS_SETTINGS = {
    r"runs/[^/]+/config\.json": "the settings, to resume the run",
    r"runs/[^/]+/(jobs|attempts)/\w+/plan\.json": "the request to a worker",
    r"cache/digests\S*": "digests by path",
    r"\.qwen3ft/prefect/prefect\.db:flow_run": "the parameters of the run, to start it again",
}


def texts_below(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, content) of each file below `folder`, and of each table of each database."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.name.endswith(("-wal", "-shm")):
            continue  # a database is read with what its log holds
        name = path.relative_to(folder).as_posix()
        if path.read_bytes()[:15] == b"SQLite format 3":
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                database.text_factory = lambda content: content.decode("utf-8", "replace")
                tables = database.execute("select name from sqlite_master where type = 'table'")
                for (table,) in tables.fetchall():
                    rows = database.execute(f'select * from "{table}"').fetchall()
                    yield f"{name}:{table}", "\n".join(map(str, rows))
        else:
            yield name, path.read_bytes().decode("utf-8", "replace")


def test_a_key_in_any_input_of_a_run_reaches_no_output(
    project: FlowProject, resumed: Resumed
) -> None:
    """Each place of the input has a key of its own; whatever was written is searched for all.

    The run failed, was continued and judged: what it leaves on the way is searched as well.
    """
    assert resumed.ended.is_completed(), resumed.ended.message
    found: dict[str, set[str]] = {}
    for name, content in [*texts_below(project.root), ("the terminal", resumed.printed)]:
        if name.startswith("inputs/"):
            continue
        leaked = {place for place, planted in KEYS.items() if planted in content}
        if any(re.fullmatch(pattern, name) for pattern in KEEPS_IT):
            leaked = set()
        if any(re.fullmatch(pattern, name) for pattern in KEEPS_SETTINGS):
            leaked -= SETTINGS
        if leaked:
            found[name] = leaked
    assert found == {}
    assert resumed.run.path.is_dir()
