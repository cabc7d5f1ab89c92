"""Client of an OpenAI-compatible server (`POST chat/completions`) that trusts it with nothing.

A reply is a text or the reason why there is none, never a network exception, and a reason quotes
nothing that the server said. Answers are read up to a limit. Busy and broken servers (429, 5xx, no
answer) are asked again a few times, as their Retry-After says.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from qwen3ft.units import MIB

ANSWER_TOKENS = 1024
"""Longest reply: one word is asked for, but a model that reasons needs room before it."""


@dataclass(frozen=True)
class Limits:
    """Limits of time, tries and size."""

    deadline_seconds: float = 300.0
    """Time for all questions together."""
    request_seconds: float = 60.0
    """Time for one try, from connecting to the last byte."""
    tries: int = 3
    first_wait_seconds: float = 1.0
    """Wait before the second try; it doubles before each further one."""
    longest_wait_seconds: float = 60.0
    """Longest wait that a server may ask for."""
    at_a_time: int = 4
    answer_bytes: int = MIB


@dataclass(frozen=True)
class Reply:
    """Reply to one question."""

    text: str = ""
    problem: str = ""
    """Reason why there is no text: a clause about the server."""
    again: bool = False
    """True if another try may succeed."""
    wait_seconds: float = 0.0
    """Wait that the server asks for before another try."""


class Endpoint:
    """One model on the server that is the base URL of `client`."""

    def __init__(self, client: httpx.AsyncClient, model: str, limits: Limits) -> None:
        self._client = client
        self._model = model
        self._limits = limits

    async def ask(self, messages: Sequence[dict[str, str]]) -> Reply:
        """Return the model's greedy answer, after several tries if need be."""
        limits = self._limits
        wait_seconds = limits.first_wait_seconds
        for left in reversed(range(limits.tries)):
            reply = await self._try(messages)
            if not reply.again or left == 0:
                return reply
            if reply.wait_seconds > limits.longest_wait_seconds:
                return Reply(
                    problem=f"{reply.problem} and asks to wait {reply.wait_seconds:,.0f} s"
                )
            await asyncio.sleep(max(wait_seconds, reply.wait_seconds))
            wait_seconds *= 2
        raise AssertionError("no try was made")

    async def _try(self, messages: Sequence[dict[str, str]]) -> Reply:
        asked = {"model": self._model, "messages": list(messages), "temperature": 0}
        body = {**asked, "max_tokens": ANSWER_TOKENS}
        seconds = self._limits.request_seconds
        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream("POST", "chat/completions", json=body) as response,
            ):
                if response.status_code != httpx.codes.OK:
                    return _refusal(response)
                content = await self._read(response)
        except (TimeoutError, httpx.TimeoutException):
            return Reply(problem=f"it gave no answer within {seconds:g} s", again=True)
        except httpx.ConnectError:
            return Reply(problem="it cannot be reached", again=True)
        except (httpx.HTTPError, OSError, ValueError) as error:
            return Reply(problem=f"it broke off ({type(error).__name__})", again=True)
        if content is None:
            limit = self._limits.answer_bytes
            return Reply(problem=f"it sent more than {limit:,} bytes")
        return _completion(content)

    async def _read(self, response: httpx.Response) -> bytes | None:
        """Return the body, None if it is too long."""
        content = b""
        # raw: a compressed body could grow beyond any limit
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > self._limits.answer_bytes:
                return None
        return content


def open_client(url: str, key: str | None, limits: Limits) -> httpx.AsyncClient:
    """Return a client for the server at `url`; the key is in its headers and nowhere else.

    Raises:
        httpx.InvalidURL, OSError: the URL is invalid, or a certificate file cannot be read.
    """
    headers = {"Accept-Encoding": "identity"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    is_https = url.startswith("https:")
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        timeout=limits.request_seconds,
        follow_redirects=False,  # questions and key go to the configured host alone
        trust_env=is_https,  # plain http must not leave the network through a proxy
        verify=is_https,  # loading certificates takes time, and http needs none
    )


def _refusal(response: httpx.Response) -> Reply:
    status = response.status_code
    if response.is_redirect:
        return Reply(problem=f"it answers HTTP {status}, and redirects are not followed")
    again = status in (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS) or status >= 500
    wait_seconds = _retry_after_seconds(response.headers.get("Retry-After", ""))
    return Reply(problem=f"it answers HTTP {status}", again=again, wait_seconds=wait_seconds)


def _retry_after_seconds(value: str) -> float:
    """Return the seconds to wait, given seconds or a date (RFC 9110, 10.2.3); 0 if invalid."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _completion(content: bytes) -> Reply:
    """Return the text of the first choice; '' if the model wrote none."""
    try:
        body: Any = json.loads(content)
        text = body["choices"][0]["message"]["content"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return Reply(problem="its answer is not a chat completion")
    return Reply(text=text if isinstance(text, str) else "")
