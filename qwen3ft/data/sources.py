"""Which files the rows come from: paths of the config resolved to files, each with its sha256.

A path is a file, a folder (searched recursively), a glob (`data/**/*.jsonl`), a data set of the hub
(see `hub_data`) or one of the bundled files. What exists here goes before the hub.
Guarantees: the same config and folder contents always give the same files in the same order, and a
path that does not exist is an error that names it, raised before any file is read. Bundled sample
rows stand in only where the config allows it, and the run is then marked degraded. The digest is
over a file's bytes as they are on disk, compressed or not.
It imports neither torch nor transformers, and does not look inside the files (see `rows`).
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qwen3ft.config import TrainingConfig
from qwen3ft.data.digests import open_digests
from qwen3ft.data.hub import HUB_PREFIX, fetch_dataset, parse_hub_name, pin_dataset
from qwen3ft.data.readers.open import SUFFIXES, is_readable
from qwen3ft.embedded import DATA_DIR
from qwen3ft.errors import DataLoadingError
from qwen3ft.files import sha256_file
from qwen3ft.records.data import Role

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
    """One input file.

    `label` is how it is named to people: the path as given, embedded:..., or the address on the hub
    with the commit.
    """

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
        DataLoadingError: no data given, a path is missing, or a folder holds no readable file; of
            the hub's data sets see `hub_data.fetch_dataset`.
        DownloadError: the hub answered with a server error, or a download broke off.
    """
    try:
        chosen = _chosen_paths(config)
        cache = Path(config.cache_dir).expanduser()
        files = [
            file
            for role, paths in chosen.items()
            for path in paths
            for file in _files(path, role, cache)
        ]
    except DataLoadingError:
        if not config.allow_sample_data:
            raise
        return _bundled_files(), (SAMPLE_DATA,)
    unique = {(_identity(file), file.role): file for file in reversed(files)}
    return [file for file in files if unique[(_identity(file), file.role)] is file], ()


def pin_sources(config: TrainingConfig) -> TrainingConfig:
    """`config` with the commit of every hub data set, so that each process reads the same files.

    Raises:
        DataLoadingError: a data set of the hub cannot be found, and sample data is not allowed.
        DownloadError: the hub answered with a server error.
    """
    cache = Path(config.cache_dir).expanduser()
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
            return config  # `resolve_sources` will say what stands in
        raise
    return config.model_copy(update=pinned)


def fingerprint_sources(config: TrainingConfig) -> list[Fingerprint]:
    """(path, sha256, role) of every file that `config` names, in reading order.

    Digests of files that did not change are kept in `cache_dir` (see `data_digest`); what is read
    for training is hashed anew.

    Raises:
        DataLoadingError: as `resolve_sources`, or a file cannot be read.
    """
    files, _ = resolve_sources(config)
    with open_digests(Path(config.cache_dir).expanduser()) as digests:
        return [
            Fingerprint(file.label, digest_of(file, digests.sha256), file.role) for file in files
        ]


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
        SourceFile(path, _embedded_file(path), role)
        for role, paths in BUNDLED.items()
        for path in paths
    ]


def _identity(file: SourceFile) -> str:
    """What makes two files the same one; equal files of the hub share a blob and are still two."""
    return file.label if file.label.startswith(HUB_PREFIX) else str(file.path.resolve())


def _files(given: str, role: Role, cache: Path) -> list[SourceFile]:
    """The files that one path of the config stands for."""
    if given.startswith(EMBEDDED_PREFIX):
        return [SourceFile(given, _embedded_file(given), role)]
    path = Path(given).expanduser()
    if path.is_dir():
        return _folder_files(path, role)
    if not path.exists() and (asked := parse_hub_name(given)):
        try:
            found = fetch_dataset(asked, role, cache)
        except DataLoadingError as error:
            if not given.startswith(HUB_PREFIX):
                error.why += f" Nor is there a path {given} in {Path.cwd()}."
            raise
        return [SourceFile(label, path, role) for label, path in found]
    if not path.exists() and glob.has_magic(given):
        return _glob_files(path, role)
    if not path.is_file():
        raise DataLoadingError(
            f"The {role} data path {given} does not exist (looked in {Path.cwd()}).",
            why="A path is relative to the folder the command is started in.",
            next_command=f"ls -l {path.parent}",
            path=given,
        )
    if not is_readable(path):
        raise DataLoadingError(
            f"The {role} data file {given} is of no kind that can be read.",
            why=f"Readable are {', '.join(SUFFIXES)}, told by the end of the name.",
            next_command=f"ls -l {path}",
            path=given,
        )
    return [SourceFile(str(path), path, role)]


def _folder_files(folder: Path, role: Role) -> list[SourceFile]:
    """Every readable file below `folder`, sorted by name; hidden files and folders are skipped."""
    visible = (
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    files = _readable_files(visible, role)
    if not files:
        raise DataLoadingError(
            f"The {role} data folder {folder} holds none of {', '.join(SUFFIXES)}.",
            why="Folders are searched recursively; hidden files are skipped.",
            next_command=f"ls -lR {folder}",
            path=str(folder),
        )
    return files


def _glob_files(pattern: Path, role: Role) -> list[SourceFile]:
    """Every readable file that `pattern` matches, sorted by name; ** is any depth of folders."""
    # Path.glob would match hidden files.
    found = (Path(path) for path in glob.iglob(str(pattern), recursive=True))  # noqa: PTH207
    files = _readable_files(found, role)
    if not files:
        start = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
        raise DataLoadingError(
            f"The {role} data path {pattern} matches no file of a kind that can be read "
            f"(looked in {Path.cwd()}).",
            why=f"Readable are {', '.join(SUFFIXES)}; hidden files are skipped.",
            next_command=f"ls -lR {start}",
            path=str(pattern),
        )
    return files


def _readable_files(paths: Iterable[Path], role: Role) -> list[SourceFile]:
    return [
        SourceFile(str(path), path, role)
        for path in sorted(set(paths))
        if is_readable(path) and path.is_file()
    ]


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


def digest_of(file: SourceFile, sha256: Callable[[Path], str] = sha256_file) -> str:
    """The sha256 of a file's bytes, computed by `sha256`.

    Raises:
        DataLoadingError: it cannot be read.
    """
    try:
        return sha256(file.path)
    except OSError as error:
        raise DataLoadingError(
            f"The {file.role} data file {file.label} cannot be read: {error.strerror}.",
            why="Its permissions do not allow it, or its disk failed.",
            next_command=f"ls -l {file.path}",
            path=file.label,
        ) from error
