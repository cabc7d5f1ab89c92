"""Settings of a run that is resumed: its own, and the few that may change meanwhile.

`qwen3ft.settings.CHANGEABLE_SETTINGS` lists those; every other one decides the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3ft.config import TrainingConfig, checked_name, in_home, parse_config
from qwen3ft.errors import ConfigError
from qwen3ft.jobs.folders import RunDir
from qwen3ft.operations.run_state import find_runs
from qwen3ft.settings import CHANGEABLE_SETTINGS
from qwen3ft.text.commands import shell_line

_MOST_NAMED = 3


def find_begun_run(runs_dir: str | Path, run_id: str) -> RunDir:
    """Return the folder of a run that has begun.

    Args:
        runs_dir: The folder of runs, as it is typed or set.
        run_id: Its id.

    Raises:
        ConfigError: there is no such run, or it never began.
    """
    checked_name(run_id, "run", "qwen3ft status")
    folder = Path(in_home(str(runs_dir))).resolve()
    run = RunDir(folder / run_id)
    if run.config.is_file():
        return run
    newest = ", ".join(found.run.path.name for found in find_runs(folder)[:_MOST_NAMED])
    raise ConfigError(
        f"There is no run {run_id} in {folder}.",
        why=f"A run begins when it writes its settings there; {run.config} is missing. "
        + (f"The newest runs there are {newest}." if newest else "No run is there."),
        next_command="qwen3ft status",
    )


def own_settings(run: RunDir) -> TrainingConfig:
    """Return the settings that a run has begun with, with those that were changed since.

    Raises:
        ConfigError: they cannot be read.
    """
    try:
        values = json.loads(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The settings of run {run.path.name} cannot be read: {error}",
            why=f"{run.config} is damaged; without it nobody knows what the run was asked for.",
            next_command=shell_line("ls", "-l", run.path),
        ) from error
    return parse_config(values)


def resumed_settings(run: RunDir, asked: Mapping[str, Any]) -> TrainingConfig:
    """Return the settings with which a run goes on: its own, with the changes asked for.

    Raises:
        ConfigError: its own cannot be read, or a change is not allowed.
    """
    own = own_settings(run)
    values = {**own.model_dump(mode="json"), **asked}
    if isinstance(columns := asked.get("columns"), Mapping):
        values["columns"] = {**own.columns.model_dump(), **columns}
    # not given: the flow may have found an older name (`registry.task_name`) when the run began
    values["name"] = values["name"] or own.name
    wanted = parse_config(values)
    refused = [name for name in _changed(own, wanted) if name not in CHANGEABLE_SETTINGS]
    if refused:
        shown = ", ".join(
            f"{name} is {_text(own, name)} and was asked to be {_text(wanted, name)}"
            for name in refused
        )
        raise ConfigError(
            f"Run {run.path.name} cannot be resumed with other settings: {shown}.",
            why="A run keeps what decides its result. What may change: "
            f"{', '.join(CHANGEABLE_SETTINGS)}. For other settings start a new run.",
            next_command=run.resume_command,
            refused=refused,
        )
    # A run lies where it was found, whatever its folder was called before.
    found = Path(wanted.runs_dir).resolve() == run.path.parent
    place = wanted.runs_dir if found else str(run.path.parent)
    return wanted.model_copy(update={"runs_dir": place})


def unfinished_settings(run: RunDir, tonight: TrainingConfig) -> tuple[TrainingConfig, list[str]]:
    """Return the settings with which tonight's run finishes an earlier one, and those it ignores.

    What may change is taken from `tonight`, all else from the earlier run.
    """
    own = own_settings(run)
    changes = {name: getattr(tonight, name) for name in CHANGEABLE_SETTINGS}
    ignored = [name for name in _changed(own, tonight) if name not in CHANGEABLE_SETTINGS]
    return own.model_copy(update=changes), ignored


def _changed(before: TrainingConfig, after: TrainingConfig) -> list[str]:
    names = TrainingConfig.model_fields
    return [name for name in names if getattr(before, name) != getattr(after, name)]


def _text(config: TrainingConfig, name: str) -> str:
    return json.dumps(config.model_dump(mode="json")[name], ensure_ascii=False)[:200]
