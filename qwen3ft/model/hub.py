"""Sources of models: a local folder, the embedded model, or a pinned commit on the hub.

Resolving never loads weights. Nothing that comes with a model is executed: only safetensors are
accepted, and a config.json that asks for its own code is refused.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError

from qwen3ft.config import TrainingConfig
from qwen3ft.disk.digests import open_digests
from qwen3ft.disk.files import sha256_json
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import (
    DownloadError,
    FinetuneError,
    ModelAccessError,
    ModelNotFoundError,
    ModelUnavailableError,
)
from qwen3ft.logs import get_logger
from qwen3ft.model.hub_errors import TIMEOUT_SECONDS, RepoKind, endpoint, hub_error, not_found
from qwen3ft.model.saved_adapter import TOKENIZER_FILES
from qwen3ft.model.shapes import KNOWN_MODELS
from qwen3ft.model.source_folder import check_model_folder, check_tokenizer_files, files_read
from qwen3ft.records.model import ModelSource

logger = get_logger("hub")

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt")
"""Files to download of a hub model; no pickled weights, no code."""

TOKENIZER_PATTERNS = (*TOKENIZER_FILES, "added_tokens.json", "vocab.json", "merges.txt", "*.jinja")
"""Files to download for reading data; without config.json, which marks a cached model."""

_MODEL = RepoKind(
    noun="model",
    fact="model",
    not_found=ModelNotFoundError,
    access=ModelAccessError,
    unavailable=ModelUnavailableError,
    setting="qwen3ft plan --set model_name={}",
    default_revision="qwen3ft plan --set model_revision=main",
    local="qwen3ft settings model_name",
)


def resolve_model(config: TrainingConfig) -> ModelSource:
    """Resolve the model that `config` names to a folder or a commit, without downloading it.

    Raises:
        ModelNotFoundError: no such folder and no such name on the hub; it suggests close names.
        ModelAccessError: the repository is gated and this machine has no access to it.
        ModelUnavailableError: the hub cannot be reached and no complete copy is cached.
        DownloadError: the hub answered with a server error.
        ConfigError: the folder is refused (see `check_model_folder`).
    """
    cache_dir = Path(config.cache_dir)
    if config.is_embedded:
        return _resolve_folder(config.model_name, MODEL_DIR, cache_dir)
    folder = os.path.expanduser(config.model_name)  # noqa: PTH111  these never raise
    if os.path.isdir(folder):  # noqa: PTH112
        return _resolve_folder(config.model_name, Path(folder).resolve(), cache_dir)
    if config.model_name.count("/") != 1 or config.model_name.startswith((".", "~", "/")):
        why = "There is no such folder, and names on the hub are OWNER/NAME."
        raise not_found(_MODEL, config.model_name, why, close_names(config.model_name))
    return ModelSource(model_name=config.model_name, revision=_resolve_revision(config))


def fetch_model(source: ModelSource) -> Path:
    """Return the folder with the files of `source`, downloading those that are not cached.

    Raises:
        DownloadError: the download was interrupted; the next call resumes it.
        ConfigError: the model is refused (see `check_model_folder`).
    """
    if source.local_path is not None:
        return Path(source.local_path)
    folder = _download(source, MODEL_FILES)
    check_model_folder(folder)
    return folder


def fetch_tokenizer(source: ModelSource) -> Path:
    """Return a folder with the tokenizer of `source`, downloading no weights.

    Raises:
        DownloadError: as in `fetch_model`.
        TokenizerError: it is refused (see `check_tokenizer_files`).
    """
    if source.local_path is not None:
        return Path(source.local_path)
    folder = _download(source, TOKENIZER_PATTERNS)
    check_tokenizer_files(folder)
    return folder


def _download(source: ModelSource, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            source.model_name,
            revision=source.revision,
            allow_patterns=list(files),
            endpoint=endpoint(),
        )
    except (OSError, ValueError, HTTPError) as error:
        raise _translate_hub_error(error, source.model_name, source.revision) from error
    return Path(folder)


def close_names(name: str) -> list[str]:
    """Return up to three known models with names like `name`, closest first."""
    names = [hub_name for model in KNOWN_MODELS for hub_name in model.hub_names]
    spelling = {known.lower(): known for known in names}
    spelling.update({known.lower().partition("/")[2]: known for known in names})
    matches = difflib.get_close_matches(name.lower(), spelling, n=6, cutoff=0.6)
    return list(dict.fromkeys(spelling[match] for match in matches))[:3]


def _resolve_folder(name: str, folder: Path, cache_dir: Path) -> ModelSource:
    """Return a local model; its revision covers the content of every file that is read.

    Digests of files that did not change are taken from `cache_dir`.
    """
    check_model_folder(folder)
    with open_digests(cache_dir) as digests:
        files = {
            path.relative_to(folder).as_posix(): digests.sha256(path) for path in files_read(folder)
        }
    return ModelSource(model_name=name, revision=sha256_json(files), local_path=str(folder))


def same_base(named: Mapping[str, Any], source: ModelSource) -> bool:
    """Return True if `source` is the base model that an adapter's provenance names."""
    if named["model_name"] != source.model_name:
        return False
    if named["revision"] == source.revision:
        return True
    folder = source.local_path
    return folder is not None and named["revision"] == _revision_by_times(Path(folder))


def _revision_by_times(folder: Path) -> str:
    """Return the revision that versions before 0.1 gave a local model: by names, sizes, times."""
    stats = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
        if path.suffix in {".safetensors", ".json", ".jinja", ".txt"}
    ]
    config_text = (folder / "config.json").read_text(encoding="utf-8")
    return sha256_json({"files": stats, "config": config_text})


def _resolve_revision(config: TrainingConfig) -> str:
    from huggingface_hub import HfApi

    wanted = config.model_revision
    if wanted is not None and len(wanted) == 40 and _cached_commit(config.model_name, wanted):
        return wanted
    try:
        info = HfApi(endpoint=endpoint()).model_info(
            config.model_name, revision=wanted, timeout=TIMEOUT_SECONDS
        )
    except (OSError, ValueError, HTTPError) as error:
        translated = _translate_hub_error(error, config.model_name, wanted)
        cached = _cached_commit(config.model_name, wanted)
        if cached is None or isinstance(translated, ModelNotFoundError):
            raise translated from error
        logger.warning("the hub cannot be reached; using the cached commit %s", cached[:12])
        return cached
    if info.sha is None:
        raise DownloadError(
            f"The hub named no commit for {config.model_name}.",
            why="Its response is incomplete.",
            next_command="qwen3ft doctor",
        )
    return str(info.sha)


def _cached_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a cached copy, which is the name of its folder."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    return Path(found).parent.name if isinstance(found, str) else None


def _translate_hub_error(error: Exception, name: str, revision: str | None) -> FinetuneError:
    return hub_error(error, _MODEL, name, revision, close_names(name))
