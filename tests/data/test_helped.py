"""Tests of the data stage with helpers: the same files, and every row accounted for."""

from __future__ import annotations

import itertools
import os
import random
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.data_stage import SNAPSHOT, accounted, write_jsonl

from qwen3ft.config import TrainingConfig
from qwen3ft.data import pipeline as pipeline_module
from qwen3ft.data import row_table
from qwen3ft.data.folder import read_manifest
from qwen3ft.data.pipeline import DataPipeline
from qwen3ft.data.tokenizing import BatchWork
from qwen3ft.disk.manifests import read_manifest_facts
from qwen3ft.errors import WorkerCrashedError
from qwen3ft.jobs import helpers as helpers_module
from qwen3ft.records.data import DatasetManifest

ROWS = 400
CHOICES: dict[str, tuple[Any, ...]] = {
    "max_rows": (None, 130, 150, 1),
    "max_sequence_length": (1024, 400, 200),
    "too_long": ("drop", "shorten_reasoning"),
    "near_duplicates": ("keep", "drop"),
    "personal_data": ("report", "quarantine", "off"),
    "rows_without_reasoning": ("empty_block", "leave_out"),
    "special_tokens_in_text": ("quarantine", "escape"),
    "train_turns": ("all", "last"),
    "held_out_fraction": (0.1, 0.4),
    "max_rows_per_source": (None, 250, 90),
    "new_data": ("all", "mix"),
}
VARIANTS = 10
SOONER = (0, 2, 3, 4, 7, 9)
"""Variants that together take every choice; the others are slow."""


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of every kind that some setting treats in its own way."""
    chance = random.Random(seed)
    words = "river window garden letter market silver doctor engine 价格 会议 提高".split()  # noqa: SIM905
    made: list[dict[str, Any]] = []
    for number in range(count):
        asked = f"{number % 150} {' '.join(chance.choices(words, k=9))}?"
        row: dict[str, Any] = {"question": asked, "answer": " ".join(chance.choices(words, k=4))}
        match number % 10:
            case 1 | 2:
                row["reasoning"] = " ".join(chance.choices(words, k=chance.choice((5, 60, 200))))
            case 3:
                row["answer"] += " write to jane.doe@acme-corp.io"
            case 4:
                row["answer"] += " <|im_end|>"
            case 5 if made:
                row = dict(made[chance.randrange(len(made))])
            case 6 if made:
                row = dict(made[-1], answer="another answer of some words that differ")
            case 7:
                turns = [asked, "yes", "and then?", "no"]
                roles = itertools.cycle(("user", "assistant"))
                row = {"messages": [{"role": next(roles), "content": text} for text in turns]}
            case 8:
                row = {"question": asked}
        made.append(row)
    return made


def outcome(manifest: DatasetManifest) -> tuple[Any, ...]:
    """Return the digests of all files, and the manifest without its place."""
    facts = read_manifest_facts(Path(manifest.path))
    kept = {name: value for name, value in facts.items() if "path" not in name}
    return kept, manifest.model_dump(exclude={"path", "quarantine_path"})


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every data stage two helpers, and its files batches of few rows."""
    monkeypatch.setattr(helpers_module, "_can_fork", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(row_table, "BATCH_ROWS", 60)


def settings_of(variant: int) -> dict[str, Any]:
    """Return settings by their number; 0 are the defaults."""
    chance = random.Random(variant)
    return {name: chance.choice(values) for name, values in CHOICES.items()} if variant else {}


def test_every_choice_is_among_the_variants_that_are_not_slow() -> None:
    """And so it is tested in every run of the tests."""
    taken = {item for variant in SOONER for item in settings_of(variant).items()}
    assert taken == {(name, choice) for name, choices in CHOICES.items() for choice in choices}


@pytest.mark.usefixtures("helped")
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(number, marks=() if number in SOONER else pytest.mark.slow)
        for number in range(VARIANTS)
    ],
)
def test_helpers_give_the_same_files_under_all_settings_and_no_row_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: int
) -> None:
    settings = {**settings_of(variant), "max_bad_fraction": 0.9}
    data = (
        write_jsonl(tmp_path / "a.jsonl", rows(ROWS, variant)),
        write_jsonl(tmp_path / "b.jsonl", rows(ROWS // 3, variant + 1)),
    )
    config = TrainingConfig(model_name="embedded", data_paths=data, **settings)
    known = None
    if config.new_data == "mix":
        seen = TrainingConfig(model_name="embedded", data_paths=data[1:], max_bad_fraction=0.9)
        manifest = DataPipeline(seen).prepare(SNAPSHOT, tmp_path / "seen")
        known = str(Path(manifest.path) / "known_rows.npy")
    outcomes = []
    for least_bytes in (0, 2**40):
        monkeypatch.setattr(pipeline_module, "LEAST_BYTES_FOR_HELPERS", least_bytes)
        target = tmp_path / f"data-{least_bytes}"
        manifest = DataPipeline(config).prepare(SNAPSHOT, target, known_rows=known)
        assert accounted(manifest) == manifest.rows_read == ROWS + ROWS // 3
        assert read_manifest(target) == manifest
        outcomes.append(outcome(manifest))
    assert outcomes[0] == outcomes[1]


@pytest.mark.usefixtures("helped")
@pytest.mark.parametrize("method", ["features", "tokens"])
def test_a_helper_that_is_killed_ends_the_stage_with_its_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(pipeline_module, "LEAST_BYTES_FOR_HELPERS", 0)
    stage, work = os.getpid(), getattr(BatchWork, method)

    def dying(self: BatchWork, task: Any) -> Any:
        place = getattr(task, "place", task)
        if place.start >= 120 and os.getpid() != stage:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(self, task)

    monkeypatch.setattr(BatchWork, method, dying)
    # Found by its name in the helper, as the true one is.
    dying.__name__ = method
    data = write_jsonl(tmp_path / "a.jsonl", rows(ROWS, 0))
    config = TrainingConfig(model_name="embedded", data_paths=(data,), max_bad_fraction=0.9)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(WorkerCrashedError, match="SIGKILL"):
        DataPipeline(config).prepare(SNAPSHOT, tmp_path / "data")
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_check_makes_the_folder_that_a_run_takes(
    tmp_path: Path, make_config: Any, snapshot: Any
) -> None:
    from qwen3ft.data.pipeline import dataset_target
    from qwen3ft.data.sources import resolved

    data = write_jsonl(tmp_path / "a.jsonl", rows(60, 0))
    config = make_config(data_paths=(data,), max_bad_fraction=0.9)
    manifest = DataPipeline(config).check()
    target = dataset_target(resolved(config), snapshot)
    assert read_manifest(target) == manifest
