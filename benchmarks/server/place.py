"""A registry with versions of known answers, a server that follows it, and its clients."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from support.databases import migrated
from support.registered import MODEL, copy_database, register_saved
from support.served import Running, keep_test_answers, running
from support.trained_adapter import Trained, train_adapter

from qwen3ft.records.model import SavedAdapter
from qwen3ft.registry.moves import Change, this_person
from qwen3ft.registry.registry import Registry
from qwen3ft.server.sources import find_source

BY_HAND = Change(by=this_person(), reason="a campaign")


@dataclass
class Place:
    """A trained adapter, and the registry that its versions are in."""

    trained: Trained
    registry: Registry
    uri: str
    folder: Path
    names: dict[str, str] = field(default_factory=dict)
    """Kind of each registered version."""
    answers: dict[str, list[str]] = field(default_factory=dict)
    """Answers to the rows by version, if they were kept."""

    def add(self, run: str, saved: SavedAdapter, *, keep: bool = True) -> str:
        """Register an adapter, with its answers as those of its test; return the version."""
        answers = keep_test_answers(self.trained, saved) if keep else []
        number = register_saved(self.uri, self.folder / "registered", run, saved)
        self.names[number], self.answers[number] = run, answers
        return number

    @property
    def champion(self) -> str | None:
        """The version in use, as the registry has it."""
        found = self.registry.champion(MODEL)
        return found.version if found else None

    def promote(self, number: str) -> None:
        """Make a version the champion, by hand."""
        self.registry.promote(MODEL, number, self.champion, BY_HAND)

    @contextmanager
    def served(self, **options: Any) -> Iterator[Running]:
        """Serve the champion with a worker of its own."""
        source = find_source(self.trained.config, self.registry, "champion")
        with running(self.trained.config, source, self.registry, follow=MODEL, **options) as server:
            yield server


def make_place(folder: Path, max_new_tokens: int) -> Place:
    """Train an adapter; make an empty registry."""
    trained = train_adapter(folder)
    uri = copy_database(migrated("mlflow"), folder / "place")
    changes = {"name": MODEL, "max_new_tokens": max_new_tokens}
    config = trained.config.model_copy(update=changes)
    return Place(replace(trained, config=config), Registry(uri), uri, folder)


@dataclass(frozen=True)
class Reply:
    """One answer as a client saw it."""

    row: int
    asked_at: float
    seconds: float
    status: int
    version: str
    answer: str


class Clients:
    """Threads' worth of clients in one event loop, each asking one row after the other.

    Args:
        server: Whom they ask.
        questions: The rows' questions.
        count: Number of clients.
    """

    def __init__(self, server: Running, questions: list[str], count: int) -> None:
        self.server, self.questions, self.count = server, questions, count
        self.replies: list[Reply] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()))

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Wait until `holds` returns True; False if it takes longer."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    async def _work(self) -> None:
        limits = httpx.Limits(max_connections=self.count)
        async with httpx.AsyncClient(
            base_url=str(self.server.client.base_url), limits=limits, timeout=120, trust_env=False
        ) as client:
            await asyncio.gather(*(self._ask_on(client, one) for one in range(self.count)))

    async def _ask_on(self, client: httpx.AsyncClient, first: int) -> None:
        row = first % len(self.questions)
        while not self._stop.is_set():
            row = (row + 1) % len(self.questions)
            self.replies.append(await self._ask(client, row))

    async def _ask(self, client: httpx.AsyncClient, row: int) -> Reply:
        started = time.monotonic()
        body = {"messages": [{"role": "user", "content": self.questions[row]}]}
        try:
            response = await client.post("/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            return Reply(row, started, time.monotonic() - started, 0, "", repr(error))
        seconds, content = time.monotonic() - started, response.json()
        if response.status_code != 200:
            return Reply(row, started, seconds, response.status_code, "", response.text)
        version = content["model"].removeprefix(f"{MODEL}-v")
        answer = content["choices"][0]["message"]["content"]
        return Reply(row, started, seconds, 200, version, answer)
