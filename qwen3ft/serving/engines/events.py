"""Streams of events from a program that answers over HTTP on a Unix socket."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx

from qwen3ft.errors import WorkerCrashedError

_SILENCE_SECONDS = 600.0
_MOST_SHOWN_CHARACTERS = 300


class NotTakenError(Exception):
    """A program that is sound does not take one request; the text is what it says."""


def open_engine(socket: Path) -> httpx.AsyncClient:
    """Return a client of the program that listens on `socket`; any number of requests at once."""
    limits = httpx.Limits(max_connections=None)
    transport = httpx.AsyncHTTPTransport(uds=str(socket), limits=limits)
    return httpx.AsyncClient(
        base_url="http://engine", transport=transport, timeout=_SILENCE_SECONDS
    )


async def events(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> AsyncGenerator[dict[str, Any]]:
    """Send a request; yield the JSON of each server-sent event of the answer.

    Raises:
        NotTakenError: the program refuses this request.
        WorkerCrashedError: the program is gone, or does not answer.
    """
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                said = (await response.aread()).decode(errors="replace")
                if response.is_client_error:
                    raise NotTakenError(said[:_MOST_SHOWN_CHARACTERS])
                raise engine_failed(said)
            async for line in _lines(response):
                content = line.removeprefix(b"data: ")
                if content == line or content == b"[DONE]":
                    continue
                event = json.loads(content)
                if "error" in event:
                    raise engine_failed(content.decode(errors="replace"))
                yield event
    except httpx.HTTPError as error:
        raise engine_failed(f"{type(error).__name__}: {error}") from error


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes]:
    """Yield the lines of a stream, which end at line feeds alone.

    `aiter_lines` ends them at U+0085, U+2028 and U+2029 too, which JSON has as they are.
    """
    rest = b""
    async for block in response.aiter_bytes():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    """Send a request of which only the success counts.

    Raises:
        WorkerCrashedError: the program is gone, or refuses it.
    """
    try:
        response = await client.post(path, json=body)
    except httpx.HTTPError as error:
        raise engine_failed(f"{type(error).__name__}: {error}") from error
    if response.status_code != 200:
        raise engine_failed(response.text)


def engine_failed(reason: str) -> WorkerCrashedError:
    """Return the error for a program that does not do what it was asked for."""
    return WorkerCrashedError(
        f"The engine does not answer: {reason.strip()[:_MOST_SHOWN_CHARACTERS]!a}.",
        why="It has crashed, or refuses what it has taken before.",
        next_command="qwen3ft serve --engine own",
    )
