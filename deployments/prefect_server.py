"""Prefect's server behind the guard, with transactions that wait for each other instead of failing.

`python -m deployments.prefect_server PORT` starts it on loopback, as `prefect server start` does;
with `--until-stdin-ends` it does not outlive whoever started it.

Prefect begins most SQLite transactions as DEFERRED. Such a transaction reads first and asks for the
write lock later, and SQLite refuses that at once, whatever the busy timeout, if another connection
holds the lock (SQLITE_BUSY) or has committed since the read (SQLITE_BUSY_SNAPSHOT). The server then
answers 503: clients try again, its web page does not. A transaction that begins as IMMEDIATE waits
for its turn before it reads. Prefect does so itself where a caller passes `with_for_update`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from prefect.server.api import deployments, server
from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from prefect.server.database.dependencies import MODELS_DEPENDENCIES
from prefect.server.database.orm_models import ArtifactCollection
from prefect.server.schemas import core
from prefect.server.schemas.ui import UISettings
from prefect.server.utilities.schemas import TimeSeriesBaseModel
from prefect.settings import get_current_settings
from prefect.utilities.schema_tools.validation import ValidationError
from pydantic import field_validator
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

from deployments.guard import Guard
from deployments.services import DEPLOYMENT
from qwen3ft.config import ColumnNames, TrainingConfig
from qwen3ft.text.names import closest_name

_UNKNOWN = re.compile(r"\('(\w+)'.* unexpected\)|'(\w+)' does not match any of the regexes: .*")


class ImmediateSqlite(AioSqliteConfiguration):
    """Prefect's SQLite configuration, with transactions that wait for the write lock first."""

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        """Begin a transaction that holds the write lock from its first statement on."""
        async with super().begin_transaction(session, with_for_update) as transaction:
            token = SQLITE_BEGIN_MODE.set("IMMEDIATE")
            try:
                await session.connection()  # sends BEGIN, which waits up to 60 s for the lock
            finally:
                # a session opened by what follows begins as Prefect means it to: one that only
                # reads must not wait for this transaction
                SQLITE_BEGIN_MODE.reset(token)
            yield transaction


def use_immediate_transactions() -> None:
    """Make the server of this process use `ImmediateSqlite`, unless it is on another database."""
    url = get_current_settings().server.database.connection_url
    assert url is not None  # Prefect fills in its own database where none is set
    if url.get_secret_value().startswith("sqlite"):
        MODELS_DEPENDENCIES["database_config"] = ImmediateSqlite(url.get_secret_value())


def suggest_settings() -> None:
    """Make refusals of unknown parameters say which setting was meant, and how it is given."""
    check = deployments.validate  # type: ignore[attr-defined]

    def validate(*arguments: Any, **options: Any) -> Any:
        try:
            return check(*arguments, **options)
        except ValidationError as error:
            schema = arguments[1] if len(arguments) > 1 else options["schema"]
            if "config" not in schema.get("properties", ()):
                raise  # a deployment of the user's own, or `join`
            raise ValidationError(in_words(str(error))) from error

    deployments.validate = validate  # type: ignore[attr-defined]


def in_words(refusal: str) -> str:
    """Return the refusal of an unknown parameter with what was meant; others as they are."""
    found = _UNKNOWN.search(refusal)
    if found is None:
        return refusal
    name = found[1] or found[2]
    within_columns = "columns" in refusal.partition("Failure reason")[0]
    known = ColumnNames.model_fields if within_columns else TrainingConfig.model_fields
    meant = name if name in known else closest_name(name, known)
    text = f"{refusal[: found.start()].removesuffix('Additional properties are not allowed ')}"
    text += f"{name!r} is not known there"
    if meant and meant != name:
        text += f"; did you mean {meant}?"
    given = f"--param 'config={{\"{meant or 'NAME'}\": ...}}'"
    if within_columns:
        return text
    return f"{text}. A setting is given like this: prefect deployment run {DEPLOYMENT} {given}"


class OrderedArtifact(TimeSeriesBaseModel, core.Artifact):
    """Artifact whose id grows with time: Prefect's pages sort by it, to show the newest first."""


def use_ordered_artifacts() -> None:
    """Make the server of this process give artifacts, and their keys, ids that grow with time."""
    core.Artifact = OrderedArtifact  # type: ignore[misc]
    default = ArtifactCollection.__table__.c.id.default
    default.arg = lambda _: TimeSeriesBaseModel().id


class WithoutLogin(UISettings):
    """Settings of Prefect's pages by which they ask for no password: the guard has signed in."""

    @field_validator("auth", mode="before")
    @classmethod
    def _none(cls, _: object) -> None:
        return None


def run(port: int) -> None:
    """Serve on loopback until SIGTERM."""
    use_immediate_transactions()
    suggest_settings()
    use_ordered_artifacts()
    server.UISettings = WithoutLogin  # type: ignore[attr-defined]
    settings = get_current_settings().server
    assert settings.api.auth_string is not None  # see `services.access`
    guard = Guard(
        server.create_app(final=True),
        settings.api.auth_string.get_secret_value().partition(":")[2],
        is_page=lambda path: not path.startswith("/api"),
        sockets_sign_in=True,
    )
    uvicorn.run(
        guard,
        host="127.0.0.1",
        port=port,
        timeout_keep_alive=settings.api.keepalive_timeout,
        log_level=settings.logging_level.lower(),
    )


def end_with_stdin() -> None:
    """End this process in order when its standard input ends."""

    def wait() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    if "--until-stdin-ends" in sys.argv:
        end_with_stdin()
    run(int(sys.argv[1]))
