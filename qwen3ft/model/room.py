"""Places that a run will write to, tried before it trains: writable, and with room for its files.

What is larger than all of this, the quantised model and the tokenised rows, is checked when its
size is known, before training too.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import EnvironmentNotReadyError, FinetuneError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.logs import get_logger
from qwen3ft.model.shapes import find_shape, plan_adapter
from qwen3ft.units import MIB, size_text

logger = get_logger("environment")

SMALL_FILES_BYTES = 16 * MIB
"""Room for logs, cards, tokenizer and everything else that does not grow with the adapter."""

_BYTES_PER_PARAMETER = 4
_COPIES_IN_A_CHECKPOINT = 3  # the adapter and both moments of AdamW


class Place(NamedTuple):
    """A folder that a run will write to."""

    setting: str
    folder: Path
    needed_bytes: int


def require_room(config: TrainingConfig, run: RunDir, store: Path | None) -> None:
    """Try every place that the run will write to.

    Args:
        config: Names the folders, and the model, whose adapter's size follows.
        run: The run, which may have been trained already.
        store: Folder of MLflow's database and artifacts; None if a server keeps them.

    Raises:
        EnvironmentNotReadyError: one of them cannot be written, or has too little room; of the
            output folders, all of them.
    """
    adapter_bytes = _adapter_bytes(config)
    needed: dict[int, int] = {}  # by file system, since places share them
    for place in _places(config, run, store, adapter_bytes):
        if problem := _find_problem(place, needed):
            raise _not_ready(place, problem, run)
    problems = {}
    for setting, folder in _output_dirs(config):
        place = Place(setting, folder, adapter_bytes + SMALL_FILES_BYTES)
        problem = _find_problem(place, needed)
        if problem is None:
            return
        logger.warning("the adapter cannot be saved to %s: %s", folder, problem)
        problems[folder] = (place, problem)
    raise _not_ready(*next(iter(problems.values())), run)


def resume_elsewhere(needed_bytes: int, run: RunDir) -> str:
    """Return the command that finishes a run whose output folders cannot take its adapter.

    If no usual place has room, it is the one that shows which disks have.
    """
    for folder in _spare_places():
        if _room(folder) >= needed_bytes:
            return run.command_to_resume(output_dir=folder)
    return "df -h"


def _places(
    config: TrainingConfig, run: RunDir, store: Path | None, adapter_bytes: int
) -> Iterator[Place]:
    checkpoints = config.keep_checkpoints + 2  # the best one, and the one that is being written
    if any(job.outcome.exists() for job in run.attempts()):
        checkpoints = 0  # it is trained
    checkpoint_bytes = _COPIES_IN_A_CHECKPOINT * adapter_bytes
    yield Place("runs_dir", run.path, checkpoints * checkpoint_bytes + SMALL_FILES_BYTES)
    yield Place("cache_dir", Path(config.cache_dir).resolve(), SMALL_FILES_BYTES)
    yield Place("TMPDIR", Path(tempfile.gettempdir()), adapter_bytes + SMALL_FILES_BYTES)
    if store is not None:
        yield Place("MLFLOW_TRACKING_URI", store, adapter_bytes + SMALL_FILES_BYTES)


def _output_dirs(config: TrainingConfig) -> Iterator[tuple[str, Path]]:
    yield "output_dir", Path(config.output_dir).resolve()
    yield from (("fallback_output_dirs", Path(d).resolve()) for d in config.fallback_output_dirs)


def _adapter_bytes(config: TrainingConfig) -> int:
    try:
        _, shape = find_shape(config.model_name)
        return _BYTES_PER_PARAMETER * plan_adapter(config, shape).trainable_parameters
    except FinetuneError:  # a model that is known by its name alone: its stage will tell
        return 0


def _find_problem(place: Place, needed: dict[int, int]) -> str | None:
    """Say why the place cannot be written, or add what it needs to `needed` of its disk."""
    try:
        place.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=place.folder, prefix=".qwen3ft-") as stream:
            stream.write(b"tried")
        disk = place.folder.stat().st_dev
    except (OSError, ValueError) as error:
        return f"it cannot be written ({getattr(error, 'strerror', None) or error})"
    wanted = needed.get(disk, 0) + place.needed_bytes
    free = _room(place.folder)
    if free < wanted:
        return f"the run needs {size_text(wanted)} on its disk, {size_text(free)} are free"
    needed[disk] = wanted
    return None


def _room(folder: Path) -> int:
    """Return the bytes that can be written to a folder or, if it is missing, to its parent."""
    for existing in (folder, *folder.parents):
        if existing.is_dir():
            return shutil.disk_usage(existing).free if os.access(existing, os.W_OK) else 0
    return 0


def _spare_places() -> Iterator[Path]:
    for parent in (Path.cwd(), Path.home(), Path("/var/tmp"), Path(tempfile.gettempdir())):  # noqa: S108
        yield parent / "qwen3ft-adapters"


def _not_ready(place: Place, problem: str, run: RunDir) -> EnvironmentNotReadyError:
    is_output = place.setting in ("output_dir", "fallback_output_dirs")
    return EnvironmentNotReadyError(
        f"The run cannot write to {place.folder}: {problem}.",
        why=f"It is the setting {place.setting}, which the run would need after hours of training."
        if is_output
        else f"It is {place.setting}; the run needs it to its end.",
        next_command=resume_elsewhere(place.needed_bytes, run)
        if is_output
        else f"df -h {shlex.quote(str(place.folder.parent))}",
        setting=place.setting,
    )
