"""Every place that a run will write to is tried before it trains."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.cli.options import read_overrides
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.model import room
from qwen3ft.model.room import SMALL_FILES_BYTES, require_room
from qwen3ft.settings import CHANGEABLE_SETTINGS
from qwen3ft.units import GIB, MIB


def config(folder: Path, **changes: Any) -> TrainingConfig:
    folders = {"runs_dir": "runs", "cache_dir": "cache", "output_dir": "out"}
    paths = {name: str(folder / path) for name, path in folders.items()}
    return TrainingConfig.model_validate({"model_name": "embedded", **paths, **changes})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "r1")


@pytest.mark.parametrize("folder", ["/proc/x", "/dev/null/x", "x" * 300])
@pytest.mark.parametrize("setting", ["output_dir", "cache_dir"])
def test_a_place_that_cannot_be_written_is_found_before_training(
    tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch, setting: str, folder: str
) -> None:
    """For the folder of adapters, the next command names another, with which the run goes on."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnvironmentNotReadyError, match="cannot be written") as refused:
        require_room(config(tmp_path, **{setting: folder}), run, None)
    assert refused.value.facts["setting"] == setting
    if setting == "output_dir":
        words = shlex.split(refused.value.next_command)
        assert words[:4] == ["qwen3ft", "run", "--resume", "r1"]
        changes = read_overrides([word for word in words[4:] if "=" in word])
        assert changes.keys() <= CHANGEABLE_SETTINGS.keys()
        require_room(config(tmp_path, **changes), run, None)


def test_mlflows_place_and_the_runs_own_are_tried_too(tmp_path: Path, run: RunDir) -> None:
    """Nothing is left behind."""
    with pytest.raises(EnvironmentNotReadyError, match="MLFLOW_TRACKING_URI"):
        require_room(config(tmp_path), run, Path("/proc/x"))
    with pytest.raises(EnvironmentNotReadyError, match="runs_dir"):
        require_room(config(tmp_path), RunDir(Path("/proc/x")), None)
    require_room(config(tmp_path), run, tmp_path / "mlruns")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_one_output_folder_that_works_is_enough(tmp_path: Path, run: RunDir) -> None:
    """The adapter is saved to the first of them that does."""
    broken, fine = "/dev/null/x", str(tmp_path / "fine")
    require_room(config(tmp_path, output_dir=broken, fallback_output_dirs=[fine]), run, None)
    with pytest.raises(EnvironmentNotReadyError, match="/dev/null/x"):
        require_room(config(tmp_path, output_dir=broken, fallback_output_dirs=[broken]), run, None)


@pytest.mark.parametrize(
    ("model", "free_bytes", "fits"),
    [
        ("embedded", 5 * SMALL_FILES_BYTES + 8 * MIB, True),
        ("embedded", 4 * SMALL_FILES_BYTES - 1, False),
        # rank 6 of the 4B is 50 MB: 4 checkpoints of 3, the adapter, its copy in a temporary folder
        ("Qwen/Qwen3-4B-Thinking-2507", GIB, True),
        ("Qwen/Qwen3-4B-Thinking-2507", 600 * MIB, False),
    ],
)
def test_places_on_one_disk_need_room_together(
    tmp_path: Path,
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    free_bytes: int,
    fits: bool,
) -> None:
    """The room follows from the size of the adapter and the number of checkpoints."""
    usage = SimpleNamespace(free=free_bytes)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(room.tempfile, "tempdir", str(tmp_path))
    if fits:
        require_room(config(tmp_path, model_name=model), run, None)
        return
    with pytest.raises(EnvironmentNotReadyError, match="are free"):
        require_room(config(tmp_path, model_name=model), run, None)
