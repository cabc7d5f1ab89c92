"""Prefect's command line, with a server whose concurrent transactions wait instead of failing.

`python -m deployments.prefect_server server start` takes the same arguments as `prefect`.

Prefect begins most SQLite transactions as DEFERRED. Such a transaction reads first and asks for the
write lock later, and SQLite refuses that at once, whatever the busy timeout, if another connection
holds the lock (SQLITE_BUSY) or has committed since the read (SQLITE_BUSY_SNAPSHOT). The server then
answers 503: clients try again, its web page does not. A transaction that begins as IMMEDIATE waits
for its turn before it reads. Prefect does so itself where a caller passes `with_for_update`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prefect.cli import app
from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from prefect.server.database.dependencies import MODELS_DEPENDENCIES
from prefect.settings import get_current_settings
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


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


if __name__ == "__main__":
    use_immediate_transactions()
    app()
