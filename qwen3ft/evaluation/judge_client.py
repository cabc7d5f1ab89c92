"""Questions to an OpenAI-compatible server (`POST chat/completions`): bounded, whatever it answers.

Guarantees: a reply is a text or the reason why there is none, never an exception of the network's;
no redirect is followed, so questions and key go to the configured host alone; an answer is read up
to a limit; what a server says is in no reason. Busy and broken servers (429, 5xx, no answer) are
asked again a few times, as their Retry-After says.
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
"""One word is asked for; a judge that thinks needs room before it."""


@dataclass(frozen=True)
class Limits:
    """How long, how often and how much."""

    deadline_seconds: float = 300.0
    """For all questions together."""
    request_seconds: float = 60.0
    """For one try, from connecting to the last byte."""
    tries: int = 3
    first_wait_seconds: float = 1.0
    """Before the second try; doubled before each one after."""
    longest_wait_seconds: float = 60.0
    """A server that asks for more is given up on."""
    at_a_time: int = 4
    answer_bytes: int = MIB


@dataclass(frozen=True)
class Reply:
    """What came of one question."""

    text: str = ""
    problem: str = ""
    """Why there is no text: a clause about the server, in our words."""
    again: bool = False
    """Whether another try may succeed."""
    wait_seconds: float = 0.0
    """What the server asks to wait before it."""


class Endpoint:
    """One model of one server, asked over `client`, whose base URL is the server's."""

    def __init__(self, client: httpx.AsyncClient, model: str, limits: Limits) -> None:
        self._client = client
        self._model = model
        self._limits = limits

    async def ask(self, messages: Sequence[dict[str, str]]) -> Reply:
        """The model's greedy answer, after a few tries at most."""
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
            return Reply(problem=f"it answered with more than {limit:,} bytes")
        return _completion(content)

    async def _read(self, response: httpx.Response) -> bytes | None:
        """The body as it came, None if it is too long; what is compressed could grow."""
        content = b""
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > self._limits.answer_bytes:
                return None
        return content


def open_client(url: str, key: str | None, limits: Limits) -> httpx.AsyncClient:
    """A client for the server at the base URL `url`; the key is in its header and nowhere else.

    Raises:
        httpx.InvalidURL, OSError: the URL, or a certificate the environment names, cannot be used.
    """
    headers = {"Accept-Encoding": "identity"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    is_https = url.startswith("https:")
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        timeout=limits.request_seconds,
        follow_redirects=False,
        trust_env=is_https,  # a proxy would take what is plain out of the house
        verify=is_https,  # certificates, which take time to load, are of no use without TLS
    )


def _refusal(response: httpx.Response) -> Reply:
    status = response.status_code
    if response.is_redirect:
        return Reply(problem=f"it answers HTTP {status}, a redirect, and none is followed")
    again = status in (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS) or status >= 500
    wait_seconds = _retry_after_seconds(response.headers.get("Retry-After", ""))
    return Reply(problem=f"it answers HTTP {status}", again=again, wait_seconds=wait_seconds)


def _retry_after_seconds(value: str) -> float:
    """Seconds or a date (RFC 9110, 10.2.3), as seconds from now; 0 for what is neither."""
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _completion(content: bytes) -> Reply:
    """The text of the first choice; '' where the model wrote none."""
    try:
        body: Any = json.loads(content)
        text = body["choices"][0]["message"]["content"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return Reply(problem="what it answers is no chat completion")
    return Reply(text=text if isinstance(text, str) else "")
