"""Paths of the config resolved to files, each with its sha256.

A path is a file, a folder (searched recursively), a glob (`data/**/*.jsonl`), a data set of the hub
or one of the bundled files; what exists on disk goes before the hub. The same config and folder
contents give the same files in the same order. In a folder of training data, files that are named
as a data set's validation or test split are held out, and files that are not read are named. A path
that does not exist is an error, raised before any file is read, unless the config allows sample
rows to stand in.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3ft.config import TrainingConfig, in_home
from qwen3ft.data.hub import DESCRIPTIONS, HUB_PREFIX, fetch_dataset, parse_hub_name, pin_dataset
from qwen3ft.data.readers.open import SUFFIXES, suffix_of
from qwen3ft.data.readers.unread import next_command_for, why_unread
from qwen3ft.data.safety import mask_keys
from qwen3ft.data.splits import DEV_NAMES
from qwen3ft.disk.digests import DigestCache, mark_of, open_digests
from qwen3ft.embedded import DATA_DIR
from qwen3ft.errors import DataLoadingError
from qwen3ft.records.data import ResolvedSources, Role, SourceFile
from qwen3ft.text.commands import existing_path, shell_line
from qwen3ft.text.plain import escaped_line

EMBEDDED_PREFIX = "embedded:"
EMBEDDED_SPLITS = ("train", "dev", "test", "novel")
BUNDLED: dict[Role, tuple[str, ...]] = {
    "train": ("embedded:train",),
    "dev": ("embedded:dev",),
    "test": ("embedded:test", "embedded:novel"),
}
_SPLIT_NAMES: dict[str, Role] = {**dict.fromkeys(DEV_NAMES, "dev"), "test": "test"}
# test.jsonl, test-00000-of-00002.parquet, gsm8k_test.jsonl, my.test.csv, test/0.parquet
_SPLIT_NAME = re.compile(rf"(?:^|.*[-_./])({'|'.join(_SPLIT_NAMES)})(?:[-_][0-9]+.*)?$")
_SHOWN_SKIPPED = 3
SETTINGS_THAT_MATTER = (
    *("data_paths", "dev_paths", "test_paths", "columns", "reasoning_separator", "train_turns"),
    *("rows_without_reasoning", "special_tokens_in_text", "personal_data", "too_long"),
    *("near_duplicates", "new_data", "replay_fraction", "max_rows", "max_rows_per_source"),
    *("held_out_fraction", "max_bad_fraction", "allow_sample_data", "max_sequence_length"),
    "is_embedded",
)
"""Settings that decide which rows there are, and their tokens."""

SAMPLE_DATA = "sample data"
"""Mark of a run that trained on the bundled rows in place of its own."""


def resolved(config: TrainingConfig) -> ResolvedSources:
    """Pin the hub's data sets, find the files and fingerprint them, once for a whole stage.

    Digests of files that did not change are taken from `cache_dir`.

    Raises:
        DataLoadingError: as `resolve_sources`, or a file cannot be read.
        DownloadError: as `resolve_sources`.
    """
    # Pinned first: otherwise a data set may change between two looks at it.
    pinned = pin_sources(config)
    files, degraded, skipped = resolve_sources(pinned)
    with open_digests(Path(config.cache_dir)) as digests:
        fingerprinted = tuple(_fingerprinted(file, digests) for file in files)
    return ResolvedSources(config=pinned, files=fingerprinted, degraded=degraded, skipped=skipped)


def pin_sources(config: TrainingConfig) -> TrainingConfig:
    """Return `config` with the commit of every hub data set, for each process the same files.

    Raises:
        DataLoadingError: a data set of the hub cannot be found, and sample data is not allowed.
        DownloadError: the hub answered with a server error.
    """
    cache = Path(config.cache_dir)
    try:
        pinned = {
            name: tuple(
                path if Path(path).expanduser().exists() else pin_dataset(path, cache)
                for path in getattr(config, name)
            )
            for name in ("data_paths", "dev_paths", "test_paths")
        }
    except DataLoadingError:
        if config.allow_sample_data:
            return config  # `resolve_sources` will report the sample data
        raise
    return config.model_copy(update=pinned)


def resolve_sources(
    config: TrainingConfig,
) -> tuple[list[SourceFile], tuple[str, ...], tuple[str, ...]]:
    """Return the files to read, in order, marks of degradation, and the files that are not read.

    Roles without any file (`dev`, `test`) are to be held out from the training rows. The mark is
    that of sample data. A file that is not read is one of a folder or glob, and named with why.

    Raises:
        DataLoadingError: no data given, a path is missing, or a folder holds no readable file; for
            the hub's data sets see `hub.fetch_dataset`.
        DownloadError: the hub answered with a server error, or a download broke off.
    """
    skipped: list[str] = []
    try:
        chosen = _chosen_paths(config)
        cache = Path(config.cache_dir)
        files = [
            file
            for role, paths in chosen.items()
            for path in paths
            for file in _files(path, role, cache, skipped)
        ]
    except DataLoadingError:
        if not config.allow_sample_data:
            raise
        return _bundled_files(), (SAMPLE_DATA,), ()
    # Reversed, so that a file that is named twice keeps its first place.
    unique = {(_identity(file), file.role): file for file in reversed(files)}
    files = [file for file in files if unique[(_identity(file), file.role)] is file]
    return files, (), tuple(skipped)


def _fingerprinted(file: SourceFile, digests: DigestCache) -> SourceFile:
    try:
        # The mark is taken first, so that a write during hashing shows when the file is read.
        size, modified, *_ = mark_of(file.path)
        digest = digests.sha256(file.path)
    except OSError as error:
        raise DataLoadingError(
            f"The {file.role} data file {file.label} cannot be read: {error.strerror}.",
            why="Its permissions do not allow it, its disk failed, or it was removed just now.",
            next_command=shell_line("ls", "-l", file.path.parent),
            path=file.label,
        ) from error
    return replace(file, sha256=digest, size_bytes=size, modified_ns=modified)


def _chosen_paths(config: TrainingConfig) -> dict[Role, tuple[str, ...]]:
    """Return the paths of each role; where the bundled rows are trained on, their own tests too."""
    given: dict[Role, tuple[str, ...]] = {
        "train": config.data_paths,
        "dev": config.dev_paths,
        "test": config.test_paths,
    }
    if config.data_paths == BUNDLED["train"] or (config.is_embedded and not config.data_paths):
        return {role: given[role] or BUNDLED[role] for role in given}
    if config.data_paths:
        return given
    raise DataLoadingError(
        "No training data was given: data_paths is empty.",
        why=f"Only the embedded model brings rows of its own; {config.model_name} does not.",
        next_command="qwen3ft settings data_paths",
    )


def _bundled_files() -> list[SourceFile]:
    return [
        SourceFile(path, _embedded_file(path), role)
        for role, paths in BUNDLED.items()
        for path in paths
    ]


def _identity(file: SourceFile) -> str:
    # Equal files of the hub share one blob on disk, and are two files all the same.
    return file.label if file.label.startswith(HUB_PREFIX) else str(file.path.resolve())


def _files(given: str, role: Role, cache: Path, skipped: list[str]) -> list[SourceFile]:
    """Return the files that one path of the config stands for."""
    if given.startswith(EMBEDDED_PREFIX):
        return [SourceFile(given, _embedded_file(given), role)]
    path = Path(given).expanduser()
    if path.is_dir():
        return _folder_files(path, role, skipped)
    if not path.exists() and (asked := parse_hub_name(given)):
        try:
            found = fetch_dataset(asked, role, cache)
        except DataLoadingError as error:
            if not given.startswith(HUB_PREFIX):
                error.why += f" There is no path {given} in {Path.cwd()} either."
            raise
        return [_source(path, role, label) for label, path in found]
    if not path.exists() and glob.has_magic(given):
        return _glob_files(path, role, skipped)
    if not path.is_file():
        raise DataLoadingError(
            f"The {role} data path {given} does not exist (looked in {Path.cwd()}).",
            why="A path is relative to the folder the command is started in.",
            next_command=shell_line("ls", "-l", existing_path(path.parent)),
            path=given,
        )
    if why := why_unread(path):
        raise DataLoadingError(
            f"The {role} data file {given} has an unsupported file type: {why}.",
            why=f"The end of its name must be one of {', '.join(SUFFIXES)}.",
            next_command=next_command_for(path),
            path=given,
        )
    return [_source(path, role)]


def _folder_files(folder: Path, role: Role, skipped: list[str]) -> list[SourceFile]:
    """Return the readable files below `folder` that are not hidden, sorted by name."""
    visible: list[Path] = []
    hidden: list[Path] = []
    for path in folder.rglob("*"):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        (hidden if is_hidden else visible).append(path)
    # Notebooks and version control leave hidden files of all kinds; only rows are missed.
    skipped.extend(
        f"{_shown(path)}: hidden files are not read"
        for path in sorted(hidden)
        if path.is_file() and not why_unread(path)
    )
    files = [
        replace(file, role=_role_in(file.path.relative_to(folder), role))
        for file in _readable_files(visible, role, skipped)
    ]
    if not files:
        raise DataLoadingError(
            f"The {role} data folder {folder} has no {', '.join(SUFFIXES)} file.",
            why="Folders are searched recursively; hidden files are skipped." + _foreign(skipped),
            next_command=shell_line("ls", "-lR", folder),
            path=str(folder),
        )
    return files


def _role_in(path: Path, role: Role) -> Role:
    """Return the role of a file of a folder: its own split, by its name or a folder's."""
    if role != "train":
        return role
    stem = path.name[: -len(suffix_of(path.name))].lower()
    for name in (stem, *(folder.lower() for folder in path.parts[:-1])):
        if match := _SPLIT_NAME.match(name):
            return _SPLIT_NAMES[match[1]]
    return role


def _glob_files(pattern: Path, role: Role, skipped: list[str]) -> list[SourceFile]:
    """Return the readable files that `pattern` matches, sorted by name; ** is any depth."""
    # Path.glob would match hidden files.
    found = (Path(path) for path in glob.iglob(str(pattern), recursive=True))  # noqa: PTH207
    files = _readable_files(found, role, skipped)
    if not files:
        start = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
        raise DataLoadingError(
            f"The {role} data path {pattern} matches no file of a supported type "
            f"(looked in {Path.cwd()}).",
            why=f"Supported are {', '.join(SUFFIXES)}; hidden files are skipped."
            + _foreign(skipped),
            next_command=shell_line("ls", "-lR", start),
            path=str(pattern),
        )
    return files


def _readable_files(paths: Iterable[Path], role: Role, skipped: list[str]) -> list[SourceFile]:
    files = []
    for path in sorted(set(paths)):
        if not path.is_file():
            continue
        if why := why_unread(path):
            skipped.append(f"{_shown(path)}: {why}")
        elif path.name.lower() in DESCRIPTIONS:
            skipped.append(f"{_shown(path)}: it describes a data set and has no rows")
        else:
            files.append(_source(path, role))
    return files


def _foreign(skipped: list[str]) -> str:
    """Return a sentence on the first files that were not read."""
    return f" Not read: {'; '.join(skipped[:_SHOWN_SKIPPED])}." if skipped else ""


def _source(path: Path, role: Role, name: str | None = None) -> SourceFile:
    """Return a file under a name that may be shown wherever the file is spoken of.

    Raises:
        DataLoadingError: its path is not UTF-8, so that no worker could be told of it.
    """
    name = name or str(path)
    shown = _shown(name)
    if any("\ud800" <= character <= "\udfff" for character in str(path)):
        raise DataLoadingError(
            f"The name of the {role} data file {shown} is not UTF-8.",
            why="It was written in another encoding, and cannot be passed on as it is.",
            next_command=f"ls -lb {shlex.quote(escaped_line(str(path.parent)))}",
            path=shown,
        )
    if shown != name:  # two names that differ in what is not shown stay apart
        shown = f"{shown} ({hashlib.sha256(name.encode()).hexdigest()[:8]})"
    return SourceFile(shown, path, role)


def _shown(name: str | Path) -> str:
    return escaped_line(mask_keys(str(name)))


def _embedded_file(given: str) -> Path:
    split = given.removeprefix(EMBEDDED_PREFIX)
    if split not in EMBEDDED_SPLITS:
        raise DataLoadingError(
            f"There are no bundled rows called {given}.",
            why=f"There are {', '.join(EMBEDDED_PREFIX + name for name in EMBEDDED_SPLITS)}.",
            next_command="qwen3ft plan --set 'data_paths=[embedded:train]'",
            path=given,
        )
    return DATA_DIR / f"{split}.jsonl"


def command_to_check(config: TrainingConfig, verb: str = "check", /, **changes: Any) -> str:
    """Return the command that looks at the data of `config` with some of its settings changed.

    Args:
        config: Settings of the data that was looked at.
        verb: 'check' or 'preview'.
        changes: Settings to change.
    """
    wanted = config.model_copy(update=changes)
    values, usual = wanted.model_dump(mode="json"), TrainingConfig().model_dump(mode="json")
    parts = [
        f"qwen3ft data {verb}",
        *(shlex.quote(path_from(Path.cwd(), path)) for path in wanted.data_paths),
    ]
    for name in ("model_name", *SETTINGS_THAT_MATTER):
        value: Any = values.get(name)
        is_usual = value == usual.get(name) and name not in changes
        # The model is always named: the project may start from another one's settings.
        if name == "data_paths" or (is_usual and name != "model_name"):
            continue
        if name in ("dev_paths", "test_paths"):
            value = [path_from(Path.cwd(), path) for path in value]
        if name == "columns":
            value = {part: column for part, column in value.items() if column is not None}
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"--set {shlex.quote(f'{name}={text}')}")
    return " ".join(parts)


def show_command(paths: Iterable[Path]) -> str:
    """Return the command that shows the beginning of the first of these files, or what it is."""
    path = next(iter(paths))
    can_be_shown = path.suffix.lower() in (".jsonl", ".json", ".csv", ".tsv")
    return f"{'head -c 2000' if can_be_shown else 'ls -l'} {shlex.quote(str(path.resolve()))}"


def path_from(folder: Path, given: str) -> str:
    """Return a path of data that is relative to `folder` so that it holds anywhere.

    Names of the hub's data sets and of bundled rows stay as they are.

    Raises:
        DatasetNotFoundError: it begins with hf://datasets/ and is not a valid name.
    """
    path = folder / in_home(given)
    is_name = given.startswith(EMBEDDED_PREFIX) or (not path.exists() and parse_hub_name(given))
    return given if is_name else os.path.abspath(path)  # noqa: PTH100  a link stays a link
