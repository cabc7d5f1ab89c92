"""The product for Python programs and notebooks: what the command line does, as functions.

Every function works in a project folder, as a command does: the one that the working folder lies
in, else the working folder itself. Paths in settings are relative to it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.deploy import choose_defaults
from flows.cli.adapters import choose_adapter, from_here
from flows.cli.project import open_project, use_local_services
from qwen3ft.config import (
    TrainingConfig,
    checked_name,
    load_config,
    merge_settings,
    parse_config,
    read_settings_file,
    with_current_names,
)
from qwen3ft.disk.files import private_files
from qwen3ft.errors import RequestError
from qwen3ft.jobs.folders import RunDir, read_record
from qwen3ft.operations.resumption import find_begun_run, own_settings, resumed_settings
from qwen3ft.operations.run_state import ending_of
from qwen3ft.records.evaluation import ModelScore
from qwen3ft.records.run_card import RunCard
from qwen3ft.text.commands import shell_line

if TYPE_CHECKING:
    from qwen3ft.serving.session import ChatSession

RunSettings = TrainingConfig | Mapping[str, Any] | str | os.PathLike[str] | None
"""Settings of a run: all of them, those that differ from the project's, a YAML file, or none."""


@dataclass(frozen=True)
class Run:
    """A run that has ended, however it ended; in a notebook it is shown as its card."""

    id: str
    folder: Path
    config: TrainingConfig
    card: RunCard

    @classmethod
    def load(cls, run_id: str, folder: str | os.PathLike[str] | None = None) -> Run:
        """Read a run of a project.

        Args:
            run_id: Its id, the name of its folder below `runs_dir`.
            folder: A folder of the project; by default the working folder.

        Raises:
            RequestError: there is no such run, or it has no card yet.
            ConfigError: that cannot be the id of a run.
        """
        with project(folder) as config:
            name = checked_name(run_id, "run", "qwen3ft status")
            return _read_run(Path(config.runs_dir).resolve() / name)

    @property
    def outcome(self) -> str:
        """The outcome in one word, such as 'promoted' or 'kept'."""
        return self.card.outcome

    @property
    def verdict(self) -> str:
        """The reason of the outcome in one sentence."""
        return self.card.verdict

    @property
    def scores(self) -> dict[str, ModelScore]:
        """Scores on the held-out questions by model: 'base', 'candidate', 'champion'."""
        return {score.label: score for score in self.card.scores}

    @property
    def adapter(self) -> Path | None:
        """The folder of the saved adapter, None if the run did not get that far."""
        return Path(self.card.adapter_path) if self.card.adapter_path else None

    def _repr_markdown_(self) -> str:
        return (self.folder / "card.md").read_text(encoding="utf-8")


@contextmanager
def project(folder: str | os.PathLike[str] | None = None) -> Iterator[TrainingConfig]:
    """Work in a project while the body runs: in its folder, with its servers if they are up.

    As with the commands, other users of the machine can read no file that is written meanwhile.

    Args:
        folder: A folder inside the project; by default the working folder.

    Yields:
        The settings that its runs start from.
    """
    variables = dict(os.environ)
    with chdir(folder or Path.cwd()), private_files():
        try:
            stack = open_project(anywhere=True)
            use_local_services(stack)
            _reread_prefect_settings()
            yield parse_config(choose_defaults(stack.root).config)
        finally:
            for name in os.environ.keys() - variables.keys():
                del os.environ[name]
            os.environ.update(variables)
            _reread_prefect_settings()


def finetune(
    config: RunSettings = None,
    *,
    resume: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Run:
    """Fine-tune, compare with the base model and the champion, and promote what is better.

    The same as `qwen3ft train`: all stages run now, training in worker processes. In a notebook, an
    interrupted cell or a restarted kernel ends the run, which can be resumed.

    Args:
        config: The settings; a mapping holds those that differ from the project's.
        resume: Id of an earlier run to continue from its last checkpoint, with its own settings;
            `config` may change the few that do not decide its result.
        folder: A folder inside the project; by default the working folder.

    Returns:
        The run, which may have found nothing new to train on (`outcome`).

    Raises:
        FinetuneError: the run failed or was cancelled; the error says why and names the next
            command.
    """
    config = _in_place(config)
    with project(folder) as start:
        if resume is None:
            wanted = _requested(config)
        else:
            changes = _changes(config)
            earlier = find_begun_run(changes.get("runs_dir") or start.runs_dir, resume)
            if ending_of(earlier) is not None:
                return _read_run(earlier.path)
            wanted = resumed_settings(earlier, changes)
        from flows.finetune import run_in_process  # Prefect reads its settings when it is imported

        with _no_running_loop():
            state = run_in_process(wanted, resume)
            state.result()  # raises what ended it
        run_id = resume or str(state.state_details.flow_run_id)
        return _read_run(Path(wanted.runs_dir).resolve() / run_id)


@contextmanager
def open_chat(
    adapter: str = "champion",
    config: RunSettings = None,
    *,
    think: bool | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Iterator[ChatSession]:
    """Load a fine-tuned model in a worker, to be asked while the body runs.

    Args:
        adapter: 'champion', 'challenger', 'previous', a version, the id of a run, or a folder.
        config: Settings of the answers, such as `max_new_tokens`.
        think: Let the model think first; by default as in the adapter's run.
        folder: A folder inside the project; by default the working folder.

    Raises:
        FinetuneError: there is no such adapter, or it cannot be loaded.
    """
    config, adapter = _in_place(config), from_here(adapter)
    with ExitStack() as session:
        with project(folder):
            wanted = _requested(config)
            cache_dir = str(Path(wanted.cache_dir).resolve())  # the session outlives this block
            here = wanted.model_copy(update={"cache_dir": cache_dir})
            chosen = choose_adapter(here, adapter, said=_changes(config))
            chat = session.enter_context(chosen.open_session(think))
            chat.wait_until_ready()
        yield chat


def _in_place(config: RunSettings) -> RunSettings:
    """Return settings whose file is found when the working folder changes."""
    return Path(config).resolve() if isinstance(config, (str, os.PathLike)) else config


def _requested(config: RunSettings) -> TrainingConfig:
    """Return all settings of a request made in the working folder, which is the project's."""
    if isinstance(config, TrainingConfig):
        return config
    if isinstance(config, (str, os.PathLike)):
        return load_config(Path(config))
    given = with_current_names(config or {})
    return parse_config(merge_settings(choose_defaults(Path.cwd()).config, given))


def _changes(config: RunSettings) -> Mapping[str, Any]:
    """Return what a request itself sets."""
    if isinstance(config, TrainingConfig):
        return config.model_dump(mode="json", exclude_unset=True)
    if isinstance(config, (str, os.PathLike)):
        return read_settings_file(Path(config))
    return with_current_names(config or {})


def _read_run(folder: Path) -> Run:
    run = RunDir(folder)
    if not folder.is_dir():
        raise RequestError(
            f"There is no run {folder.name} in {folder.parent}.",
            why="Its folder was removed, or it belongs to another project.",
            next_command=shell_line("ls", folder.parent),
        )
    if not (folder / "card.json").exists():
        raise RequestError(
            f"Run {folder.name} has no card.",
            why="It is in progress, or its process was killed before it could write one.",
            next_command=run.resume_command,
        )
    card = read_record(folder / "card.json", RunCard)
    return Run(folder.name, folder, own_settings(run), card)


@contextmanager
def _no_running_loop() -> Iterator[None]:
    """Hide the event loop that a notebook runs its cells in: Prefect would return coroutines."""
    # not in a thread of its own, which an interrupted cell would not reach
    loop = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)


def _reread_prefect_settings() -> None:
    """Let Prefect, if it is imported already, follow the environment."""
    if "prefect" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()
