"""Data sets of the hub: a name resolved to a commit, its data files fetched, nothing executed.

Names are `hf://datasets/OWNER/NAME[@REVISION][/glob]` or a bare `OWNER/NAME[@REVISION]`; a slash in
a revision is written %2F. All files come from one commit, which is part of their labels. Only files
that our readers know are fetched, never a data set's script. The commit of a name is noted below
the cache folder, so that a run without network finds the same files.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from huggingface_hub.errors import HTTPError

from qwen3ft.data.readers.open import SUFFIXES, suffix_of
from qwen3ft.disk.files import write_json_atomic
from qwen3ft.errors import (
    DatasetAccessError,
    DatasetNotFoundError,
    DatasetUnavailableError,
    DownloadError,
    FinetuneError,
)
from qwen3ft.logs import get_logger
from qwen3ft.model.hub_errors import TIMEOUT_SECONDS, RepoKind, endpoint, hub_error
from qwen3ft.text.names import flaw_of_name

logger = get_logger("data")

HUB_PREFIX = "hf://datasets/"
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files of the datasets library about a data set, without its rows."""

_REPO = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w.%-]+))?(?:/(?P<glob>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# At the start of a word: "latest" is no test, and "retrieval" no eval.
_HELD_OUT = {
    "dev": re.compile(r"(?:^|[^a-z])(?:valid|dev|eval|val(?![a-z]))"),
    "test": re.compile(r"(?:^|[^a-z])test"),
}
_SHOWN_FILES = 8

_DATASET = RepoKind(
    noun="data set",
    fact="dataset",
    not_found=DatasetNotFoundError,
    access=DatasetAccessError,
    unavailable=DatasetUnavailableError,
    setting="qwen3ft plan --set 'data_paths=[hf://datasets/{}]'",
    default_revision="qwen3ft plan --set 'data_paths=[hf://datasets/{}]'",
    local="qwen3ft settings data_paths",
)


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, as a path of the config names it."""

    name: str
    """OWNER/NAME."""
    revision: str | None
    glob: str | None
    """Pattern of the files to read; None to choose them by name."""


def parse_hub_name(given: str) -> HubDataset | None:
    """Return the data set that `given` names, or None if it can only be a local path.

    Raises:
        DatasetNotFoundError: it begins with hf://datasets/ and is not a valid name.
    """
    is_explicit = given.startswith(HUB_PREFIX)
    match = _REPO.fullmatch(given.removeprefix(HUB_PREFIX))
    revision = unquote(match["revision"]) if match and match["revision"] else None
    if is_explicit and (match is None or any(map(flaw_of_name, (revision or "x").split("/")))):
        raise DatasetNotFoundError(
            f"{given} is not a valid name of a data set.",
            why="Names of the hub's data sets are hf://datasets/OWNER/NAME[@REVISION][/glob].",
            next_command=_DATASET.local,
            path=given,
        )
    # A bare name with a path, a suffix or a leading dot is a file that is missing, not a data set.
    if match is None or (
        not is_explicit and (match["glob"] or suffix_of(given) or given[0] == ".")
    ):
        return None
    return HubDataset(match["name"], revision, match["glob"])


def pin_dataset(given: str, cache: Path) -> str:
    """Return `given` with its commit, so that it means the same files from now on.

    Raises:
        DataLoadingError, DownloadError: as `fetch_dataset`.
    """
    asked = parse_hub_name(given)
    if asked is None:
        return given
    commit, _, _ = _resolve(asked, cache)
    return f"{HUB_PREFIX}{asked.name}@{commit}" + (f"/{asked.glob}" if asked.glob else "")


def fetch_dataset(asked: HubDataset, role: str, cache: Path) -> list[tuple[str, Path]]:
    """Return (label, local path) of each data file, sorted by name; download what is not cached.

    Args:
        asked: Data set and pattern of its files.
        role: train, dev or test: decides which files a name without pattern stands for.
        cache: Folder of the notes about names; the files go to the hub's own cache.

    Raises:
        DatasetNotFoundError: no such data set (up to three close names), revision or file.
        DatasetAccessError: it is gated and this machine has no access to it.
        DatasetUnavailableError: the hub cannot be reached and no complete copy is cached.
        DownloadError: the hub answered with a server error, or the download broke off.
    """
    from huggingface_hub import hf_hub_download

    commit, files, is_offline = _resolve(asked, cache)
    chosen = _choose(asked, role, files)
    logger.info(
        "%s at %s: reading %d of %d files", asked.name, commit[:12], len(chosen), len(files)
    )
    found = []
    for file in chosen:
        try:
            path = hf_hub_download(
                asked.name,
                file,
                repo_type="dataset",
                revision=commit,
                endpoint=endpoint(),
                local_files_only=is_offline,  # otherwise each file is tried five times in vain
            )
        except (OSError, ValueError, HTTPError) as error:
            raise _translate(error, asked) from error
        found.append((f"{HUB_PREFIX}{asked.name}@{commit}/{file}", Path(path)))
    return found


def select_files(files: list[str], role: str) -> list[str]:
    """Return the files that a name without pattern stands for, by words in their paths.

    Training reads files with 'train', or else all without test, valid, dev and eval. Held-out
    roles read files with their own words.
    """
    if role != "train":
        return [file for file in files if _HELD_OUT[role].search(file.lower())]
    training = [file for file in files if "train" in file.lower()]
    return training or [
        file for file in files if not any(word.search(file.lower()) for word in _HELD_OUT.values())
    ]


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Return a glob with ** as a regular expression; a glob without * ? [ may name a folder."""
    # Not fnmatch, whose * matches slashes too; Python has glob.translate from 3.13 on.
    rules = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob.rstrip("/"))
    pattern = ""
    for piece in pieces:
        if len(piece) > 2 and piece[0] == "[":
            pattern += "[" + re.sub("^!", "^", piece[1:-1].replace("\\", "\\\\")) + "]"
        else:
            pattern += rules.get(piece) or re.escape(piece)
    return re.compile(pattern if len(pieces) > 1 else pattern + "(?:/.*)?")


def _choose(asked: HubDataset, role: str, files: list[str]) -> list[str]:
    if asked.glob is None:
        chosen = select_files(files, role)
    else:
        pattern = glob_pattern(asked.glob)
        chosen = [file for file in files if pattern.fullmatch(file)]
    if not chosen:
        shown = ", ".join(files[:_SHOWN_FILES]) or "none"
        raise DatasetNotFoundError(
            f"{asked.name} has no data file {asked.glob or f'for the {role} role'}; its "
            f"{len(files)} data files: {shown}{', ...' if len(files) > _SHOWN_FILES else ''}.",
            why=f"Supported are {', '.join(SUFFIXES)}; scripts of data sets are never run.",
            next_command=_DATASET.setting.format(f"{asked.name}/{files[0] if files else '**'}"),
            dataset=asked.name,
            role=role,
        )
    return chosen


def _resolve(asked: HubDataset, cache: Path) -> tuple[str, list[str], bool]:
    """Return the commit, its data files in order, and whether the hub is unreachable.

    They come from the hub, or else from the note of an earlier run.
    """
    from huggingface_hub import HfApi

    note = _note(cache, asked.name, asked.revision or "")
    # A commit given in full never changes, so that its note is as good as the hub.
    is_pinned = asked.revision is not None and _COMMIT.fullmatch(asked.revision) is not None
    if is_pinned and (known := _read_note(note)):
        return *known, False
    try:
        info = HfApi(endpoint=endpoint()).dataset_info(
            asked.name, revision=asked.revision, timeout=TIMEOUT_SECONDS
        )
    except (OSError, ValueError, HTTPError) as error:
        translated = _translate(error, asked)
        known = _read_note(note)
        unreachable = isinstance(translated, (DatasetUnavailableError, DownloadError))
        if known is None or not unreachable:
            raise translated from error
        logger.warning("the hub cannot be reached; using %s as of %s", asked.name, known[0][:12])
        return *known, True
    if info.sha is None:
        raise DownloadError(
            f"The hub did not say which commit of {asked.name} it has.",
            why="Its answer is incomplete.",
            next_command="qwen3ft doctor",
        )
    names = [sibling.rfilename for sibling in info.siblings or []]
    commit, files = str(info.sha), sorted(name for name in names if _holds_rows(name))
    # Under its commit too, which is how a pinned config names it.
    for path in {note, _note(cache, asked.name, commit)}:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {"commit": commit, "files": files})
    return commit, files, False


def _holds_rows(name: str) -> bool:
    parts = name.split("/")
    is_hidden = any(part.startswith(".") for part in parts)
    return bool(suffix_of(name)) and not is_hidden and parts[-1] not in DESCRIPTIONS


def _note(cache: Path, name: str, revision: str) -> Path:
    """Return the file that notes the commit of a revision; '' is the default branch."""
    return cache / "datasets" / f"{quote(name, safe='')}@{quote(revision, safe='')}.json"


def _read_note(note: Path) -> tuple[str, list[str]] | None:
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
        return known["commit"], known["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _translate(error: Exception, asked: HubDataset) -> FinetuneError:
    from huggingface_hub.errors import RepositoryNotFoundError

    close = _close_names(asked.name) if isinstance(error, RepositoryNotFoundError) else []
    return hub_error(error, _DATASET, asked.name, asked.revision, close)


def _close_names(name: str) -> list[str]:
    """Return up to three data sets of the hub whose names resemble `name`, if it answers."""
    from huggingface_hub import HfApi

    owner, _, short = name.partition("/")
    api, known = HfApi(endpoint=endpoint()), set()
    for asked in ({"author": owner}, {"search": short}):  # either half may be what was misspelt
        try:
            known |= {info.id for info in api.list_datasets(limit=200, **asked)}
        except (OSError, ValueError, HTTPError):
            break
    spelling = {found.lower(): found for found in sorted(known)}
    matches = difflib.get_close_matches(name.lower(), spelling, n=3, cutoff=0.6)
    return [spelling[match] for match in matches]
