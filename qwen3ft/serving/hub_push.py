"""Upload an adapter to the hub of Hugging Face, as an ordinary PEFT adapter with a card.

What is uploaded is chosen by name: weights, tokenizer, chat template, decoding, and a card. The
provenance, which names files and folders, and the hashes of known rows stay here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HTTPError

from qwen3ft.disk.files import read_foreign_json, write_json_atomic
from qwen3ft.errors import (
    ConfigError,
    DownloadError,
    FinetuneError,
    ModelAccessError,
    ModelUnavailableError,
    RequestError,
)
from qwen3ft.logs import get_logger
from qwen3ft.model.adapter_checks import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from qwen3ft.model.hub_errors import TIMEOUT_SECONDS, endpoint
from qwen3ft.model.saved_adapter import GENERATION_FILE, TOKENIZER_FILES, open_adapter
from qwen3ft.records.evaluation import ModelScore
from qwen3ft.serving.hub_card import base_name, render_hub_card
from qwen3ft.text.commands import shell_line

logger = get_logger("hub_push")

_FORBIDDEN = (401, 403)


def push_adapter(
    adapter: Path,
    name: str,
    scores: Sequence[ModelScore],
    *,
    licence: str | None = None,
    private: bool = True,
) -> str:
    """Upload a saved adapter to the repository `name`, made if there is none.

    Args:
        adapter: A saved adapter.
        name: OWNER/NAME.
        scores: Results of its inference test, for the card.
        licence: The hub's name for it; by default that of the base model on the hub.
        private: Make a new repository private, and refuse one that is public.

    Returns:
        Address of the commit.

    Raises:
        ModelNotFoundError, SaveError: `adapter` is missing or damaged.
        ConfigError: `name` is no name of a repository.
        DownloadError: the hub refuses what is uploaded.
        ModelAccessError: the hub does not let this user write there.
        ModelUnavailableError: the hub cannot be reached.
        RequestError: the repository is public, and it was to be private.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    opened = open_adapter(adapter)
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("it is not of the form OWNER/NAME")
    except HFValidationError as error:
        raise ConfigError(
            f"{name[:200]!a} cannot be a repository: {error}.",
            why="An adapter is uploaded to a user's or an organisation's own repository.",
            next_command="qwen3ft push --help",
        ) from error
    with tempfile.TemporaryDirectory(prefix="qwen3ft-") as temporary:
        folder = Path(temporary)
        _fill(folder, adapter, opened.provenance)
        api = HfApi(endpoint=endpoint())
        try:
            licence = licence or _licence_of_base(api, opened.provenance["base"])
            card = render_hub_card(name, opened.provenance, scores, licence)
            (folder / "README.md").write_text(card, encoding="utf-8")
            api.create_repo(name, private=private, exist_ok=True)
            if private and api.model_info(name, timeout=TIMEOUT_SECONDS).private is False:
                raise RequestError(
                    f"{name} is a public repository already.",
                    why="A push is for those who may read it alone unless --public is given, and "
                    "it does not change who may read a repository that exists.",
                    next_command=shell_line("qwen3ft", "push", name, "--public"),
                    repository=name,
                )
            commit = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=f"Run {opened.provenance['run_id']}",
            )
        except (OSError, ValueError, HTTPError) as error:
            raise _explained(error, name) from error
    return str(commit.commit_url)


def _fill(folder: Path, adapter: Path, provenance: dict[str, Any]) -> None:
    """Copy what anybody may have into `folder`."""
    for name in (ADAPTER_FILE, GENERATION_FILE, *TOKENIZER_FILES):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / name)
    settings = read_foreign_json(adapter / ADAPTER_CONFIG_FILE)
    settings["base_model_name_or_path"] = base_name(provenance["base"])
    write_json_atomic(folder / ADAPTER_CONFIG_FILE, settings)


def _licence_of_base(api: Any, base: dict[str, Any]) -> str | None:
    """Return the licence of a base model that is on the hub, if it states one."""
    if base["local_path"]:
        return None
    name, revision = base["model_name"], base["revision"]
    try:
        info = api.model_info(name, revision=revision, timeout=TIMEOUT_SECONDS)
    except HfHubHTTPError as error:  # gated, or not on this hub; the upload does not depend on it
        text = str(error).partition("\n")[0]
        logger.warning("the card states no licence: %s does not tell its own: %s", name, text)
        return None
    stated = info.card_data.get("license") if info.card_data else None
    return stated if isinstance(stated, str) else None


def _explained(error: Exception, name: str) -> FinetuneError:
    """Return the error of this project for one of uploading."""
    text = " ".join(str(error).split())[:300]
    if not isinstance(error, HfHubHTTPError | ValueError):
        return ModelUnavailableError(
            f"The hub cannot be reached ({type(error).__name__}: {text}).",
            why="There is no network, the hub is blocked, or HF_HUB_OFFLINE is set.",
            next_command="qwen3ft doctor",
            repository=name,
        )
    response = getattr(error, "response", None)
    if response is not None and response.status_code in _FORBIDDEN:
        return ModelAccessError(
            f"The hub does not let this user write to {name} ({response.status_code}).",
            why="Nobody is logged in, or with a token that may not write there.",
            next_command="hf auth login",
            repository=name,
        )
    return DownloadError(
        f"The hub refused the upload to {name}: {text}",
        why="The answer is the hub's own.",
        next_command=shell_line("qwen3ft", "push", name),
        repository=name,
    )
