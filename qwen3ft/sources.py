"""Which files the rows come from: paths of the config resolved to files, each with its sha256.

Guarantees: the same config and folder contents always give the same files in the same order, and a
path that does not exist is an error that names it, raised before any file is read. Bundled sample
rows stand in only where the config allows it, and the run is then marked degraded.
It imports neither torch nor transformers, and does not look inside the files (see `rows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from qwen3ft.config import TrainingConfig
from qwen3ft.embedded import DATA_DIR
from qwen3ft.errors import DataLoadingError
from qwen3ft.storage import sha256_file

Role = Literal["train", "dev", "test"]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
EMBEDDED_PREFIX = "embedded:"
EMBEDDED_SPLITS = ("train", "dev", "test", "novel")
BUNDLED: dict[Role, tuple[str, ...]] = {
    "train": ("embedded:train",),
    "dev": ("embedded:dev",),
    "test": ("embedded:test", "embedded:novel"),
}
SAMPLE_DATA = "sample data"
"""The mark of a run that trained on the bundled rows in place of its own."""


@dataclass(frozen=True)
class SourceFile:
    """One input file; `label` is how it is named to people: the path as given, or embedded:..."""

    label: str
    path: Path
    role: Role


class Fingerprint(NamedTuple):
    """One input file as a key: a change of any part means other data."""

    path: str
    sha256: str
    role: Role


def resolve_sources(config: TrainingConfig) -> tuple[list[SourceFile], tuple[str, ...]]:
    """The files to read, in order, and the marks of degradation that choosing them took.

    Roles without any file (`dev`, `test`) are to be held out from the training rows.

    Raises:
        DataLoadingError: no data given, a path is missing, or a folder holds no readable file.
    """
    try:
        chosen = _chosen_paths(config)
        files = [
            file for role, paths in chosen.items() for path in paths for file in _files(path, role)
        ]
    except DataLoadingError:
        if not config.allow_sample_data:
            raise
        return _bundled_files(), (SAMPLE_DATA,)
    unique = {(file.path.resolve(), file.role): file for file in reversed(files)}
    ordered = [file for file in files if unique.get((file.path.resolve(), file.role)) is file]
    return ordered, ()


def fingerprint_sources(config: TrainingConfig) -> list[Fingerprint]:
    """(path, sha256, role) of every file that `config` names, in reading order.

    Raises:
        DataLoadingError: as `resolve_sources`, or a file cannot be read.
    """
    files, _ = resolve_sources(config)
    return [Fingerprint(file.label, digest_of(file), file.role) for file in files]


def _chosen_paths(config: TrainingConfig) -> dict[Role, tuple[str, ...]]:
    """The paths of each role; an embedded run without data takes the bundled files."""
    given: dict[Role, tuple[str, ...]] = {
        "train": config.data_paths,
        "dev": config.dev_paths,
        "test": config.test_paths,
    }
    if config.data_paths:
        return given
    if config.is_embedded:
        return {role: given[role] or BUNDLED[role] for role in given}
    raise DataLoadingError(
        "No training data was given: data_paths is empty.",
        why=f"Only the embedded model has rows of its own; {config.model_name} has none.",
        next_command="qwen3ft train --set 'data_paths=[/path/to/rows.jsonl]'",
    )


def _bundled_files() -> list[SourceFile]:
    return [
        file for role, paths in BUNDLED.items() for path in paths for file in _files(path, role)
    ]


def _files(given: str, role: Role) -> list[SourceFile]:
    """The files that one path of the config stands for."""
    if given.startswith(EMBEDDED_PREFIX):
        return [SourceFile(given, _embedded_file(given), role)]
    path = Path(given).expanduser()
    if path.is_dir():
        return _folder_files(path, role)
    if not path.is_file():
        raise DataLoadingError(
            f"The {role} data path {given} does not exist (looked in {Path.cwd()}).",
            why="A path is relative to the folder the command is started in.",
            next_command=f"ls -l {path.parent}",
            path=given,
        )
    if path.suffix.lower() not in SUFFIXES:
        raise DataLoadingError(
            f"The {role} data file {given} is of no kind that can be read.",
            why=f"Readable are {', '.join(SUFFIXES)}, told by the end of the name.",
            next_command=f"ls -l {path}",
            path=given,
        )
    return [SourceFile(str(path), path, role)]


def _folder_files(folder: Path, role: Role) -> list[SourceFile]:
    """Every readable file below `folder`, sorted by name; hidden files and folders are skipped."""
    files = [
        SourceFile(str(path), path, role)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise DataLoadingError(
            f"The {role} data folder {folder} holds none of {', '.join(SUFFIXES)}.",
            why="Folders are searched recursively; hidden files are skipped.",
            next_command=f"ls -lR {folder}",
            path=str(folder),
        )
    return files


def _embedded_file(given: str) -> Path:
    split = given.removeprefix(EMBEDDED_PREFIX)
    if split not in EMBEDDED_SPLITS:
        raise DataLoadingError(
            f"There are no bundled rows called {given}.",
            why=f"Known are {', '.join(EMBEDDED_PREFIX + name for name in EMBEDDED_SPLITS)}.",
            next_command="qwen3ft plan --set 'data_paths=[embedded:train]'",
            path=given,
        )
    return DATA_DIR / f"{split}.jsonl"


def digest_of(file: SourceFile) -> str:
    """The sha256 of a file's bytes.

    Raises:
        DataLoadingError: it cannot be read.
    """
    try:
        return sha256_file(file.path)
    except OSError as error:
        raise DataLoadingError(
            f"The {file.role} data file {file.label} cannot be read: {error.strerror}.",
            why="Its permissions do not allow it, or its disk failed.",
            next_command=f"ls -l {file.path}",
            path=file.label,
        ) from error
