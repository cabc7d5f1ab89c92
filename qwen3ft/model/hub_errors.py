"""Translation of the hub's errors, for models and data sets.

Unknown, gated, unreachable and broken become four different members of the tree in `errors`, each
with the next command.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3ft.errors import FinetuneError
from qwen3ft.jobs.failures import translate

TIMEOUT_SECONDS = 4.0
"""Time limit for the hub to resolve a name."""


@dataclass(frozen=True)
class RepoKind:
    """A kind of repository: its errors, and the commands that they suggest."""

    noun: str
    fact: str
    """Name of the error's fact that holds the repository's name."""
    not_found: type[FinetuneError]
    access: type[FinetuneError]
    unavailable: type[FinetuneError]
    setting: str
    """Command that uses another repository; "{}" is its name."""
    default_revision: str
    """Command that uses the default branch; "{}" is the name."""
    local: str
    """Command that shows what the setting may be instead, such as a local folder."""


def endpoint() -> str | None:
    """Return the hub's address if it is not the default one."""
    return os.environ.get("HF_ENDPOINT")


def hub_error(
    error: Exception, kind: RepoKind, name: str, revision: str | None, close: Sequence[str]
) -> FinetuneError:
    """Translate an error of huggingface_hub.

    Args:
        error: The error raised.
        kind: Kind of the repository.
        name: OWNER/NAME.
        revision: Requested revision; None for the default branch.
        close: Similar names, closest first.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    facts = {kind.fact: name}
    if isinstance(error, GatedRepoError):
        return kind.access(
            f"{name} is gated and this machine has no access to it.",
            why=f"Its owner requires each user to accept the terms on the {kind.noun}'s page.",
            next_command="hf auth login",
            **facts,
        )
    if isinstance(error, RevisionNotFoundError):
        return kind.not_found(
            f"{name} has no revision {revision!r}.",
            why="The branch, tag or commit does not exist there.",
            next_command=kind.default_revision.format(name),
            **facts,
        )
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return not_found(kind, name, f"The hub has no {kind.noun} of that name.", close)
    if isinstance(error, HfHubHTTPError):
        return translate(error, f"resolve the {kind.noun}")
    hint = f" Similar known names: {', '.join(close)}." if close and name not in close else ""
    return kind.unavailable(
        f"{name} is not cached on this machine, and the hub cannot be reached "
        f"({type(error).__name__}).{hint}",
        why="There is no network, or the hub is blocked. A local folder works too.",
        next_command=kind.local,
        suggestions=list(close),
        **facts,
    )


def not_found(kind: RepoKind, name: str, why: str, close: Sequence[str]) -> FinetuneError:
    """Return the error for an unknown name."""
    return kind.not_found(
        f"There is no {kind.noun} {name!r}."
        + (f" Did you mean {' or '.join(close)}?" if close else ""),
        why=why,
        next_command=kind.setting.format(close[0]) if close else kind.local,
        suggestions=list(close),
        **{kind.fact: name},
    )
