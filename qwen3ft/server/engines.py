"""The server's side of an engine, the worker that writes answers (`qwen3ft.serving.engines`)."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import AsyncGenerator
from itertools import count
from pathlib import Path

from qwen3ft.errors import FinetuneError, WorkerCrashedError
from qwen3ft.jobs.folders import JobDir
from qwen3ft.jobs.launcher import run_worker
from qwen3ft.jobs.processes import GRACE_SECONDS
from qwen3ft.records.serving import (
    MOST_LINE_BYTES,
    AdapterLoaded,
    Ask,
    Cancel,
    Close,
    Ended,
    Load,
    Piece,
    Prompting,
    Ready,
    Refused,
    ServeEnded,
    ServeRequest,
    ToServer,
    ToWorker,
    Unload,
    to_server,
)


class RefusedQuestionError(Exception):
    """A question that the engine cannot answer; `refusal` says why."""

    def __init__(self, refusal: Refused) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Engine:
    """Writes answers of several adapters on one base model, in a worker within the memory budget.

    Args:
        request: The program that writes, base model and extent; the socket is chosen here.

    Attributes:
        name: The program that writes.
        device: Its device.
        slots: Most answers written at a time.
        places: Most adapters loaded at a time.
        context_tokens: Most tokens of a prompt and its answer.
        lost: Has a result once the engine ended by itself.
    """

    def __init__(self, request: ServeRequest) -> None:
        self._request, self.name, self.device = request, request.engine, request.device
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Queue[Piece | Ended | Refused | FinetuneError]] = {}
        self._loads: dict[str, asyncio.Future[AdapterLoaded]] = {}
        self._attending: asyncio.Task[None] | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Start the worker and wait until the base model is loaded.

        Raises:
            FinetuneError: it cannot be loaded.
        """
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[Ready] = self._loop.create_future()
        self.lost: asyncio.Future[FinetuneError] = self._loop.create_future()
        # its own short path: the system allows a hundred characters for that of a socket
        self._folder = Path(tempfile.mkdtemp(prefix="qwen3ft-"))
        socket = str(self._folder / "engine")
        self._listener = await asyncio.start_unix_server(
            self._attend, socket, limit=MOST_LINE_BYTES
        )
        parent = Path(self._request.config.cache_dir).resolve() / "sessions"
        parent.mkdir(parents=True, exist_ok=True)
        request = self._request.model_copy(update={"socket": socket})
        self._job = JobDir(Path(tempfile.mkdtemp(dir=parent))).create(request)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        await asyncio.wait((self._ready, self.lost), return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            await self.close()
            raise self.lost.result()
        ready = self._ready.result()
        self.slots, self.places = ready.slots, ready.places
        self.context_tokens = ready.context_tokens

    async def load(self, name: str, folder: Path, prompting: Prompting) -> None:
        """Have the worker load an adapter, under a name that is never used twice.

        Raises:
            NoPlaceError: it does not go with those that are loaded; a new engine would do.
            FinetuneError: it cannot be used.
        """
        loaded = self._loads[name] = self._loop.create_future()
        self._send(Load(name=name, folder=str(folder), prompting=prompting))
        await asyncio.wait((loaded, self.lost), return_when=asyncio.FIRST_COMPLETED)
        del self._loads[name]
        if not loaded.done():
            raise self.lost.result()
        if (failure := loaded.result().failure) is not None:
            raise failure.to_error()

    async def unload(self, name: str) -> None:
        """Free the place of an adapter that answers nothing."""
        self._send(Unload(name=name))

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece | Ended]:
        """Yield an answer as the worker writes it; closing the generator frees its slot.

        Raises:
            RefusedQuestionError: it cannot be answered.
            FinetuneError: the engine ended.
        """
        if self.lost.done():
            raise self.lost.result()
        ask = ask.model_copy(update={"id": next(self._numbers)})
        queue = self._answers[ask.id] = asyncio.Queue()
        ended = False
        try:
            self._send(ask)
            while not ended:
                got = await queue.get()
                ended = not isinstance(got, Piece)
                if isinstance(got, Refused):
                    raise RefusedQuestionError(got)
                if isinstance(got, FinetuneError):
                    raise got
                yield got
        finally:
            del self._answers[ask.id]
            if not ended:
                self._send(Cancel(id=ask.id))

    async def close(self) -> None:
        """End the worker, with all its answers, and remove its files."""
        if self._thread is None:
            return  # it was not started
        is_ready = self._ready.done()
        if is_ready:
            self._send(Close())
        # one that still loads hears nothing; it ends as its files and socket are gone
        await asyncio.to_thread(self._thread.join, GRACE_SECONDS if is_ready else 0)
        self._listener.close()
        if self._attending is not None:
            self._writer.close()
            await asyncio.wait([self._attending], timeout=GRACE_SECONDS)
        for folder in (self._folder, self._job.path):
            shutil.rmtree(folder, ignore_errors=True)

    def _send(self, message: ToWorker) -> None:
        if not self.lost.done():
            self._writer.write(message.model_dump_json().encode() + b"\n")

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take what the worker sends to whom it is for."""
        self._writer, self._attending = writer, asyncio.current_task()
        try:
            while line := await reader.readline():
                self._take(to_server.validate_json(line))
        except ConnectionError:
            pass  # the worker is gone; `_run` says why
        finally:
            writer.close()

    def _take(self, message: ToServer) -> None:
        if isinstance(message, Ready):
            self._ready.set_result(message)
        elif isinstance(message, AdapterLoaded):
            self._loads[message.name].set_result(message)
        elif (queue := self._answers.get(message.id)) is not None:  # else it was cancelled
            queue.put_nowait(message)

    def _run(self) -> None:
        """Run the worker; the thread of `start_worker` must not be that of the server."""
        error: FinetuneError = WorkerCrashedError(
            "The engine ended before the server did.",
            why="Its worker left neither an error nor a result.",
            next_command="qwen3ft doctor",
        )
        try:
            stall_seconds = self._request.config.stall_seconds
            run_worker("serve", self._job, ServeEnded, stall_seconds=stall_seconds)
        except FinetuneError as failure:
            error = failure
        except OSError as failure:
            error = WorkerCrashedError(
                f"The engine's worker cannot be watched: {failure}.",
                why="Its folder is gone, or the disk is full.",
                next_command="df -h",
            )
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end, error)

    def _end(self, error: FinetuneError) -> None:
        self.lost.set_result(error)
        for queue in self._answers.values():
            queue.put_nowait(error)
