"""One answer on its way to its client: whole or streamed, in OpenAI's format."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.types import Message, Receive, Send

from qwen3ft.errors import FinetuneError
from qwen3ft.logs import get_logger
from qwen3ft.records.serving import Ended, Piece
from qwen3ft.server.engines import RefusedQuestionError
from qwen3ft.server.metrics import ServerMetrics
from qwen3ft.server.questions import Body, ChatQuestionBody, QuestionError
from qwen3ft.server.served import Version

logger = get_logger("server")

CLIENT_LEFT = 499
"""Status in the metrics of a request whose client did not wait for the answer."""

TAKE_SECONDS = 60.0
"""Longest time in which a client takes nothing of what it is sent."""

Answering = AsyncGenerator[Piece | Ended]


@dataclass(frozen=True)
class AnsweredRequest:
    """A request of a client that is over.

    Attributes:
        version: Version that answered.
        body: The request.
        status: Status of the response, or `CLIENT_LEFT`.
        thinking: Thinking as far as it was written.
        answer: Answer as far as it was written.
        ended: End of the answer; None if it broke off.
        seconds: Time from the request to now.
    """

    version: Version
    body: Body
    status: int
    thinking: str
    answer: str
    ended: Ended | None
    seconds: float


class OutgoingAnswer:
    """One answer on its way to its client.

    Args:
        version: Version that answers.
        body: The request.
        metrics: Where its numbers are added.
        headers: Headers of the response, besides those that every one has.
        ahead: It does not wait behind the questions of others.
    """

    def __init__(
        self,
        version: Version,
        body: Body,
        metrics: ServerMetrics,
        headers: dict[str, str],
        *,
        ahead: bool = False,
    ) -> None:
        self._version, self._body, self._ahead = version, body, ahead
        self._metrics, self._headers = metrics, headers
        self._is_chat = isinstance(body, ChatQuestionBody)
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._started = time.monotonic()
        self._texts = {"thinking": "", "answer": ""}
        self._ended: Ended | None = None

    async def send_while_wanted(self, receive: Receive, send: Send) -> int:
        """Send the answer, unless the client leaves; return the status.

        Raises:
            QuestionError: nothing was sent yet, and the question is refused.
        """
        outcome: list[int | QuestionError] = []

        async def work() -> None:
            try:
                outcome.append(await self._send(send))
            except QuestionError as error:
                outcome.append(error)
            except TimeoutError:  # of `_bounded`: it is as good as gone
                outcome.append(CLIENT_LEFT)

        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            await work()
            group.cancel_scope.cancel()
        if not outcome:
            return CLIENT_LEFT
        if isinstance(outcome[0], QuestionError):
            raise outcome[0]
        return outcome[0]

    def outcome(self, status: int) -> AnsweredRequest:
        """Return what came of the request."""
        return AnsweredRequest(
            self._version,
            self._body,
            status,
            **self._texts,
            ended=self._ended,
            seconds=self._seconds,
        )

    async def _send(self, send: Send) -> int:
        ask = self._body.ask(self._version.name).model_copy(update={"ahead": self._ahead})
        async with aclosing(self._version.engine.answer(ask)) as answering:
            try:
                first = await anext(answering)
            except RefusedQuestionError as error:
                refused = error.refusal
                raise QuestionError(400, refused.message, code=refused.code) from None
            except FinetuneError as error:
                logger.error("a request failed: %s", error)
                raise QuestionError(503, error.what, code="engine_lost") from None
            self._metrics.first_seconds.labels(self._version.name).observe(self._seconds)
            pieces = self._noted(first, answering)
            if self._body.stream:
                return await self._send_stream(_bounded(send), pieces)
            try:
                async for piece in pieces:
                    ended = piece
            except FinetuneError as error:
                raise QuestionError(503, error.what, code="engine_lost") from None
            assert isinstance(ended, Ended)
            await _send_json(_bounded(send), self._whole(ended), self._headers)
            return 200

    async def _noted(self, first: Piece | Ended, rest: Answering) -> AsyncIterator[Piece | Ended]:
        """Yield all of the answer; keep its text, and note its end."""
        got = first
        while True:
            if isinstance(got, Piece):
                self._texts[got.part] += got.text
                yield got
                got = await anext(rest)
                continue
            self._note(got)
            yield got
            return

    def _note(self, ended: Ended) -> None:
        name, self._ended = self._version.name, ended
        self._metrics.seconds.labels(name).observe(self._seconds)
        self._metrics.tokens.labels(name, "prompt").inc(ended.prompt_tokens)
        self._metrics.tokens.labels(name, "completion").inc(ended.completion_tokens)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    async def _send_stream(self, send: Send, pieces: AsyncIterator[Piece | Ended]) -> int:
        headers = {"content-type": "text/event-stream", "cache-control": "no-store"}
        await send(_start(200, headers | self._headers))

        async def event(content: str, *, more: bool = True) -> None:
            data = f"data: {content}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": more})

        if self._is_chat:
            await event(self._chunk({"role": "assistant", "content": ""}))
        try:
            async for piece in pieces:
                if isinstance(piece, Piece):
                    await event(self._chunk(self._delta(piece)))
                    continue
                await event(self._chunk({} if self._is_chat else "", piece.reason))
                options = self._body.stream_options
                if options is not None and options.include_usage:
                    await event(json.dumps({**self._envelope(), "usage": _usage(piece)}))
        except FinetuneError as error:
            lost = QuestionError(503, error.what, code="engine_lost")
            await event(json.dumps(lost.body()), more=False)
            return lost.status
        await event("[DONE]", more=False)
        return 200

    def _envelope(self) -> dict[str, Any]:
        kind = "chat.completion" if self._is_chat else "text_completion"
        suffix = ".chunk" if self._body.stream and self._is_chat else ""
        return {
            "id": self._id,
            "object": kind + suffix,
            "created": self._created,
            "model": self._version.name,
            "choices": [],
        }

    def _delta(self, piece: Piece) -> dict[str, str] | str:
        if not self._is_chat:
            return piece.text
        return {"content" if piece.part == "answer" else "reasoning_content": piece.text}

    def _chunk(self, delta: dict[str, str] | str, reason: str | None = None) -> str:
        field = "delta" if self._is_chat else "text"
        choice = {"index": 0, field: delta, "finish_reason": reason}
        return json.dumps({**self._envelope(), "choices": [choice]}, ensure_ascii=False)

    def _whole(self, ended: Ended) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": ended.reason, "logprobs": None}
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": self._texts["answer"]}
            if self._texts["thinking"]:
                message["reasoning_content"] = self._texts["thinking"]
            choice["message"] = message
        else:
            choice["text"] = self._texts["thinking"] + self._texts["answer"]
        return {**self._envelope(), "choices": [choice], "usage": _usage(ended)}


def _bounded(send: Send) -> Send:
    """Give up on a client that reads nothing: its version could never be unloaded.

    Raises:
        TimeoutError: it took nothing for `TAKE_SECONDS`.
    """

    async def bounded(message: Message) -> None:
        async with asyncio.timeout(TAKE_SECONDS):
            await send(message)

    return bounded


def _usage(ended: Ended) -> dict[str, int]:
    return {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": ended.completion_tokens,
        "total_tokens": ended.prompt_tokens + ended.completion_tokens,
    }


def _start(status: int, headers: dict[str, str]) -> dict[str, Any]:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": encoded}


async def _send_json(send: Send, content: dict[str, Any], headers: dict[str, str]) -> None:
    body = json.dumps(content, ensure_ascii=False).encode()
    length = {"content-type": "application/json", "content-length": str(len(body))}
    await send(_start(200, length | headers))
    await send({"type": "http.response.body", "body": body})
