"""One run of the server, from its socket to its end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import (
    DataLoadingError,
    EnvironmentNotReadyError,
    FinetuneError,
    PreemptedError,
)
from qwen3ft.registry.registry import Registry
from qwen3ft.server.access import Access, is_loopback, make_key
from qwen3ft.server.engines import Engine
from qwen3ft.server.follower import NO_TRIALS, Canary, ChampionFollower
from qwen3ft.server.front import Front
from qwen3ft.server.manager import Manager, probing_client
from qwen3ft.server.request_log import RequestLog
from qwen3ft.server.served import Served, Version
from qwen3ft.server.sources import Source

DEFAULT_PORT = 8000
KEY_FILE = Path(".qwen3ft/serve.key")
_BACKLOG = 2048
_GRACE_SECONDS = 10
_KEEP_ALIVE_SECONDS = 75  # with uvicorn's 5, clients that pause meet closed connections


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server.

    Attributes:
        host: Address to listen on.
        port: Port; 0 for any free one.
        queue: Requests that may wait beyond those that are answered at a time.
        probe_rows: Held-out rows to compare each version on; 0 for none.
        canary: Trials of new champions.
        log_folder: Folder for questions and answers; None to keep none.
        needs_key: Requests need a key on loopback too.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    queue: int = 64
    probe_rows: int = 100
    canary: Canary = NO_TRIALS
    log_folder: Path | None = None
    needs_key: bool = False


@dataclass(frozen=True)
class Announcement:
    """Facts that are known once the server is ready.

    Attributes:
        address: Address for clients, with /v1.
        model: Name of the version in use.
        made_key: The API key, if it was made now.
        key_file: File with the API key; None if none is needed.
    """

    address: str
    model: str
    made_key: str | None
    key_file: Path | None


@dataclass(frozen=True)
class ModelServer:
    """Everything that a server needs.

    Attributes:
        options: Its options.
        config: Settings of this machine.
        registry: Where the champion is looked up.
        source: The adapter to begin with.
        make_engine: Makes an engine for the base of the adapter in a folder.
        announce: Called once, when the adapter is loaded and proven.
        follow: Registered model whose champion is followed; None to stay with `source`.
        fall_back: Asked if the first engine does not start or answers otherwise than tested; True
            lets `make_engine` make another one.
    """

    options: ServerOptions
    config: TrainingConfig
    registry: Registry
    source: Source
    make_engine: Callable[[Path], Engine]
    announce: Callable[[Announcement], None]
    follow: str | None
    fall_back: Callable[[FinetuneError], bool] = lambda _: False

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C.

        Raises:
            EnvironmentNotReadyError: the port is in use.
            FinetuneError: the adapter cannot be served as it was tested.
        """

        async def until_signal() -> None:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop.set)
            await self.run_until(stop)

        asyncio.run(until_signal())

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set; raises as `run`."""
        options = self.options
        listening = _listen(options.host, options.port)
        port = listening.getsockname()[1]
        needs_key = options.needs_key or not is_loopback(options.host)
        key, is_new = make_key(KEY_FILE) if needs_key else ("", False)
        front = Front(Served(self.config.registered_name), options.queue)
        front.access = Access(options.host, port, key)
        address = f"http://{_own_name(options.host)}:{port}"
        if options.log_folder is not None:
            front.observers.append(RequestLog(options.log_folder).add)
        manager = Manager(front, self.config, self.make_engine, options.probe_rows)

        async def manage() -> None:
            async with probing_client(front, address, key) as client:
                version = await self._begin(manager, client)
                key_file, made = (
                    (KEY_FILE.resolve(), key if is_new else None) if key else (None, None)
                )
                self.announce(Announcement(f"{address}/v1", version.name, made, key_file))
                watching = [manager.watch_engine(client)]
                if self.follow is not None:
                    follower = ChampionFollower(manager, self.registry, self.follow, options.canary)
                    watching.append(follower.follow(client))
                tasks = [asyncio.create_task(work) for work in watching]
                try:
                    await asyncio.gather(*tasks)
                finally:  # what ends one of them ends the others, or they restart the engine
                    for task in tasks:
                        task.cancel()

        http = _Http(front)
        tasks = [
            asyncio.create_task(work) for work in (http.serve([listening]), manage(), stop.wait())
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[1].done():
                await tasks[1]  # raises what ended it
        finally:
            tasks[1].cancel()
            tasks[2].cancel()
            http.should_exit = True
            await tasks[0]
            await asyncio.wait(tasks[1:])  # none may make another engine
            await manager.close()

    async def _begin(self, manager: Manager, client: httpx.AsyncClient) -> Version:
        """Bring the first version into use, on another engine if the first one is not fit."""
        try:
            return await manager.use(self.source, client)
        # no test was kept, so no engine could be proven; or the worker was stopped, as all may be
        except (DataLoadingError, PreemptedError):
            raise
        except FinetuneError as error:
            if not self.fall_back(error):
                raise
        await manager.wait_for_leaving()
        return await manager.use(self.source, client)


class _Http(uvicorn.Server):
    """Uvicorn without signals of its own: it would end the process before the engine has ended."""

    def __init__(self, front: Front) -> None:
        super().__init__(
            uvicorn.Config(
                front.app,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=_GRACE_SECONDS,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _own_name(host: str) -> str:
    """Return the name by which this machine reaches a server that listens on `host`."""
    if host in ("0.0.0.0", "::", "localhost"):  # noqa: S104
        return "[::1]" if host == "::" else "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        EnvironmentNotReadyError: the address cannot be had.
    """
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=_BACKLOG,
        )
    except OSError as error:
        raise EnvironmentNotReadyError(
            f"The server cannot listen on {host}, port {port}: {error.strerror}.",
            why="Another program has the port, or the address is not this machine's.",
            next_command="qwen3ft serve --port 0",
        ) from error
