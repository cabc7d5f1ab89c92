"""Where a model comes from: a local folder, the embedded one, or a pinned commit of the hub.

Resolving never loads weights. Only safetensors are accepted, and a config.json that asks for code
of its own is refused: nothing that comes with a model is ever executed.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError

from qwen3ft.config import TrainingConfig
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import (
    ConfigError,
    DownloadError,
    FinetuneError,
    ModelAccessError,
    ModelNotFoundError,
    ModelUnavailableError,
)
from qwen3ft.files import sha256_json
from qwen3ft.logs import get_logger
from qwen3ft.model.hub_errors import TIMEOUT_SECONDS, RepoKind, endpoint, hub_error, not_found
from qwen3ft.model.shapes import read_shape
from qwen3ft.records.model import ModelShape, ModelSource

logger = get_logger("hub")

KNOWN_MODELS = tuple(
    f"Qwen/Qwen3-{name}"
    for name in (
        *("0.6B", "1.7B", "4B", "8B", "14B", "32B"),
        *("0.6B-Base", "1.7B-Base", "4B-Base", "8B-Base", "14B-Base"),
        *("4B-Instruct-2507", "4B-Thinking-2507"),
    )
)
"""Dense Qwen3 models on the hub, for suggestions when a name is unknown."""

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt")
"""What is fetched of a hub model; never pickled weights, never code."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "*.jinja"),
)
"""What is fetched to look at data: no config.json, which would pass for a model that is cached."""

_CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code", "custom_pipelines")

_MODEL = RepoKind(
    noun="model",
    fact="model",
    not_found=ModelNotFoundError,
    access=ModelAccessError,
    unavailable=ModelUnavailableError,
    setting="qwen3ft plan --set model_name={}",
    default_revision="qwen3ft plan --set model_revision=main",
    local="qwen3ft train --set model_name=/path/to/a/local/folder",
)


def resolve_model(config: TrainingConfig) -> ModelSource:
    """Pin down the model that `config` names, without fetching it.

    Raises:
        ModelNotFoundError: no such folder, or no such name on the hub (up to three close names).
        ModelAccessError: the repository is gated and this machine has no access to it.
        ModelUnavailableError: the hub cannot be reached and no complete copy is cached.
        DownloadError: the hub answered with a server error.
        ConfigError: the folder holds no Qwen3 model, or one that is refused.
    """
    if config.is_embedded:
        return _resolve_folder(config.model_name, MODEL_DIR)
    folder = Path(config.model_name).expanduser()
    if folder.is_dir():
        return _resolve_folder(config.model_name, folder.resolve())
    if config.model_name.count("/") != 1 or config.model_name.startswith((".", "~", "/")):
        raise _not_found(
            config.model_name, "There is no such folder, and hub names are OWNER/NAME."
        )
    return ModelSource(model_name=config.model_name, revision=_resolve_revision(config))


def fetch_model(source: ModelSource) -> Path:
    """The folder with the files of `source`, downloaded if they are not cached yet.

    Raises:
        DownloadError: the download broke off; what arrived is kept and the next call goes on.
        ConfigError: the model is refused (see `check_model_folder`).
    """
    if source.local_path is not None:
        return Path(source.local_path)
    folder = _download(source, MODEL_FILES)
    check_model_folder(folder)
    return folder


def fetch_tokenizer(source: ModelSource) -> Path:
    """A folder with the tokenizer of `source`, fetched without the weights.

    Raises:
        DownloadError: as `fetch_model`.
    """
    if source.local_path is not None:
        return Path(source.local_path)
    return _download(source, TOKENIZER_FILES)


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


def check_model_folder(folder: Path) -> ModelShape:
    """Read a model folder's shape, refusing whatever is not a plain dense Qwen3 in safetensors.

    Raises:
        ConfigError: with the reason.
    """
    try:
        settings: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(folder, f"config.json cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise _refused(folder, f"config.json holds a {type(settings).__name__}, not settings")
    if found := [key for key in _CODE_KEYS if key in settings]:
        raise _refused(folder, f"config.json asks for code of its own ({', '.join(found)})")
    if settings.get("model_type") != "qwen3":
        raise _refused(folder, f"model_type is {settings.get('model_type')!r}, not 'qwen3'")
    if not any(folder.glob("*.safetensors")):
        raise _refused(folder, "it has no .safetensors file, and pickled weights are never loaded")
    return read_shape(folder)


def close_names(name: str) -> list[str]:
    """Up to three known models whose names resemble `name`, closest first."""
    spelling = {known.lower(): known for known in KNOWN_MODELS}
    spelling.update({known.lower().partition("/")[2]: known for known in KNOWN_MODELS})
    matches = difflib.get_close_matches(name.lower(), spelling, n=6, cutoff=0.6)
    return list(dict.fromkeys(spelling[match] for match in matches))[:3]


def _resolve_folder(name: str, folder: Path) -> ModelSource:
    """A local model's revision covers names, sizes and times of its files, and its config.

    Hashing all weights would read gigabytes at the start of every run; a rewritten file changes its
    modification time, which is what has to be noticed here.
    """
    check_model_folder(folder)
    stats = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
        if path.suffix in {".safetensors", ".json", ".jinja", ".txt"}
    ]
    config_text = (folder / "config.json").read_text(encoding="utf-8")
    revision = sha256_json({"files": stats, "config": config_text})
    return ModelSource(model_name=name, revision=revision, local_path=str(folder))


def _resolve_revision(config: TrainingConfig) -> str:
    from huggingface_hub import HfApi

    wanted = config.model_revision
    if wanted is not None and len(wanted) == 40 and _is_cached(config.model_name, wanted):
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
        logger.warning("the hub cannot be reached; using the cached %s", cached[:12])
        return cached
    if info.sha is None:
        raise DownloadError(
            f"The hub named no commit for {config.model_name}.",
            why="Its answer is incomplete.",
            next_command="qwen3ft doctor",
        )
    return str(info.sha)


def _is_cached(name: str, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)


def _cached_commit(name: str, revision: str | None) -> str | None:
    """The commit of a cached copy: its folder is named after it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    return Path(found).parent.name if isinstance(found, str) else None


def _translate_hub_error(error: Exception, name: str, revision: str | None) -> FinetuneError:
    return hub_error(error, _MODEL, name, revision, close_names(name))


def _not_found(name: str, why: str) -> FinetuneError:
    return not_found(_MODEL, name, why, close_names(name))


def _refused(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{folder} cannot be fine-tuned: {reason}.",
        why="qwen3ft trains dense Qwen3 models from safetensors and never runs a model's own code.",
        next_command="qwen3ft plan --set model_name=Qwen/Qwen3-4B-Thinking-2507",
        folder=str(folder),
    )
