"""What the hub's refusals mean, for models and for data sets: one error for each reason.

Guarantees: unknown, gated, unreachable and broken are four different members of the tree in
`errors`, each with the next command; nothing here asks the network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3ft.errors import FinetuneError
from qwen3ft.jobs.failures import translate

TIMEOUT_SECONDS = 4.0
"""How long the hub may take to say what a name stands for."""


@dataclass(frozen=True)
class RepoKind:
    """A kind of repository, and how what goes wrong with it is told."""

    noun: str
    fact: str
    """The name of the fact that holds the repository's name."""
    not_found: type[FinetuneError]
    access: type[FinetuneError]
    unavailable: type[FinetuneError]
    setting: str
    """The command that names another repository in place of "{}"."""
    default_revision: str
    """The command that asks for the default branch; "{}" is the name."""
    local: str
    """The command that does without the hub."""


def endpoint() -> str | None:
    """The hub's address, if it is not the usual one."""
    return os.environ.get("HF_ENDPOINT")


def hub_error(
    error: Exception, kind: RepoKind, name: str, revision: str | None, close: Sequence[str]
) -> FinetuneError:
    """The member of the tree that an error of huggingface_hub is.

    Args:
        error: What was raised.
        kind: What was asked for.
        name: OWNER/NAME.
        revision: As it was asked for; None for the default branch.
        close: Names like it, closest first.
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
            why=f"Its owner wants each user to accept the terms on the {kind.noun}'s page.",
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
        return not_found(kind, name, f"The hub knows no {kind.noun} of that name.", close)
    if isinstance(error, HfHubHTTPError):
        return translate(error, f"resolve the {kind.noun}")
    hint = f" Known names close to it: {', '.join(close)}." if close and name not in close else ""
    return kind.unavailable(
        f"{name} is not cached on this machine, and the hub cannot be reached "
        f"({type(error).__name__}).{hint}",
        why="There is no network, or it does not lead to the hub.",
        next_command=kind.local,
        suggestions=list(close),
        **facts,
    )


def not_found(kind: RepoKind, name: str, why: str, close: Sequence[str]) -> FinetuneError:
    """The error for a name that stands for nothing."""
    return kind.not_found(
        f"No {kind.noun} {name!r}." + (f" Did you mean {' or '.join(close)}?" if close else ""),
        why=why,
        next_command=kind.setting.format(close[0]) if close else kind.local,
        suggestions=list(close),
        **{kind.fact: name},
    )
