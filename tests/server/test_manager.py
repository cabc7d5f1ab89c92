"""Engines of the server: each is closed in the end, and none replaces another before its turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import pytest
from support.trained_adapter import Trained

from qwen3ft.errors import EnvironmentNotReadyError, FinetuneError, RequestError
from qwen3ft.records.serving import Ask, Ended, Piece, Prompting
from qwen3ft.server.front import Front
from qwen3ft.server.manager import Manager
from qwen3ft.server.served import Served
from qwen3ft.server.sources import Source


class SilentEngine:
    """An engine that takes so many adapters and answers nothing."""

    slots = places = 4
    context_tokens = 100

    def __init__(self, room: int = 1, *, starts: bool = True) -> None:
        self.room, self.starts, self.is_closed = room, starts, False
        self.lost: asyncio.Future[FinetuneError] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        """Start, or fail."""
        await asyncio.sleep(0)
        if not self.starts:
            raise EnvironmentNotReadyError("No room.", why="A test.", next_command="df -h")

    async def load(self, name: str, folder: Path, prompting: Prompting) -> None:
        """Take an adapter while there is room."""
        await asyncio.sleep(0)
        if self.room == 0:
            raise RequestError("No room.", why="A test.", next_command="df -h")
        self.room -= 1

    async def unload(self, name: str) -> None:
        """Have room for one more."""
        self.room += 1

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece | Ended]:
        """Refuse: nobody asks."""
        raise NotImplementedError
        yield

    async def close(self) -> None:
        """Take note."""
        self.is_closed = True


@pytest.mark.parametrize("trouble", ["does not start", "does not load", "is refused"])
def test_a_new_engine_in_trouble_is_closed_and_the_old_one_stays(
    trained: Trained, tmp_path: Path, trouble: str
) -> None:
    """It is made since the adapter does not go with the others; then another one is used."""

    async def check() -> None:
        first, third = SilentEngine(), SilentEngine()
        second = SilentEngine(trouble != "does not load", starts=trouble != "does not start")
        made = iter((first, second, third))
        config = trained.config.model_copy(update={"runs_dir": str(tmp_path)})
        front, none = Front(Served("model"), 4), cast(Any, None)
        manager = Manager(front, config, none, lambda _: next(made), probe_rows=0)
        sources = [Source(f"v{n}", str(n), Path(trained.saved.path)) for n in (1, 2, 3)]
        await manager.use(sources[0], none)
        manager.probe_rows = 5 * (trouble == "is refused")  # no answers were kept
        with pytest.raises(FinetuneError):
            await manager.use(sources[1], none)
        await asyncio.gather(*manager._leaving)
        assert (manager.engine, first.is_closed, second.is_closed) == (first, False, True)
        manager.probe_rows = 0
        await manager.use(sources[2], none)
        await asyncio.gather(*manager._leaving)
        assert (manager.engine, first.is_closed, third.is_closed) == (third, True, False)
        await manager.close()
        assert third.is_closed

    asyncio.run(check())


def test_an_engine_that_still_loads_is_closed_at_the_end(trained: Trained) -> None:
    """Ctrl-C does not wait until the first one is there."""

    async def check() -> None:
        engine, none = SilentEngine(), cast(Any, None)
        front = Front(Served("model"), 4)
        manager = Manager(front, trained.config, none, lambda _: engine, probe_rows=0)
        source = Source("v1", "1", Path(trained.saved.path))
        using = asyncio.create_task(manager.use(source, none))
        while not manager._engines:
            await asyncio.sleep(0)
        using.cancel()
        await asyncio.wait([using])
        await manager.close()
        assert using.cancelled()
        assert engine.is_closed

    asyncio.run(check())
