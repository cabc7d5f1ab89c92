"""The server's front: OpenAI's chat completions, completions and models over HTTP."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qwen3ft.errors import FinetuneError
from qwen3ft.logs import get_logger
from qwen3ft.records.serving import Ended, Piece
from qwen3ft.server.access import Access
from qwen3ft.server.engines import RefusedQuestionError
from qwen3ft.server.metrics import ServerMetrics
from qwen3ft.server.questions import (
    Body,
    ChatQuestionBody,
    QuestionError,
    TextQuestionBody,
    parse_body,
)
from qwen3ft.server.served import Served, Version

logger = get_logger("server")

PROBE_HEADER = "x-qwen3ft-probe"
IGNORED_HEADER = "x-qwen3ft-ignored"

BYTES_PER_TOKEN = 32
"""Bytes of a body for each token of the context: any text that fits is shorter, even escaped."""

LEAST_BODY_BYTES = 2**16
MOST_RETRY_SECONDS = 60
CLIENT_LEFT = 499
"""Status in the metrics of a request whose client did not wait for the answer."""

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


class Front:
    """All routes.

    Args:
        served: Versions that answer.
        queue: Requests that may wait beyond those that are answered at a time.

    Attributes:
        observers: Called with every answer that is over.
    """

    def __init__(self, served: Served, queue: int) -> None:
        self.served, self.queue = served, queue
        self.observers: list[Callable[[AnsweredRequest], None]] = []
        self.in_progress = 0  # requests of clients, not of the probe
        self.metrics = ServerMetrics(lambda: self.in_progress)
        self.access: Access | None = None
        self.probe_secret = secrets.token_urlsafe(32)
        self.answer_seconds = 1.0  # a moving mean, for Retry-After
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", _Asking(self, ChatQuestionBody), methods=["POST"]),
                Route("/v1/completions", _Asking(self, TextQuestionBody), methods=["POST"]),
                Route("/v1/models", self._guarded(self._models)),
                Route("/health", self._guarded(self._health)),
                Route("/metrics", self._guarded(self._metrics)),
            ],
            exception_handlers={HTTPException: _no_such_route},
        )

    def require_access(self, request: Request) -> None:
        """Raise QuestionError unless the request may pass."""
        if self.access is None:
            raise QuestionError(503, "The server is starting.", code="not_ready")
        self.access.require(request)

    def choose(self, name: str | None, *, is_probe: bool) -> Version:
        """Return the version for a request, or refuse it.

        Raises:
            QuestionError: there is none, or too many requests wait.
        """
        version = self.served.find(name)
        if version is not None and (version.is_open or is_probe):
            most = version.engine.slots + self.queue
            if self.in_progress >= most and not is_probe:
                raise QuestionError(
                    429,
                    f"{self.in_progress} requests are in progress; the limit is {most}.",
                    code="queue_full",
                )
            return version
        if self.served.default is None:
            raise QuestionError(503, "No version is ready yet.", code="not_ready")
        names = ", ".join(model["id"] for model in self._list())
        raise QuestionError(
            404,
            f"There is no model {name!a}; there are {names}.",
            param="model",
            code="model_not_found",
        )

    @contextmanager
    def counted(self, *, is_probe: bool) -> Iterator[None]:
        """Count a request as in progress within the body, unless it is the probe's."""
        self.in_progress += not is_probe
        try:
            yield
        finally:
            self.in_progress -= not is_probe

    def retry_seconds(self) -> int:
        """Return the time after which a refused request may be repeated."""
        default = self.served.default
        slots = default.engine.slots if default else 1
        waiting = max(1, self.in_progress - slots)
        return max(1, min(MOST_RETRY_SECONDS, math.ceil(self.answer_seconds * waiting / slots)))

    def most_body_bytes(self) -> int:
        """Return the longest body that is read."""
        versions = self.served.versions.values()
        context = max((version.engine.context_tokens for version in versions), default=0)
        return max(LEAST_BODY_BYTES, BYTES_PER_TOKEN * context)

    def note(self, version: Version | None, status: int) -> None:
        """Count a request."""
        self.metrics.requests.labels(version.name if version else "none", str(status)).inc()

    def _guarded(self, answer: Callable[[], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self.require_access(request)
            except QuestionError as error:
                return JSONResponse(error.body(), error.status)
            return answer()

        return guarded

    def _list(self) -> list[dict[str, Any]]:
        """Return the registered model, which stands for the version in use, and all versions."""
        default, open_ones = self.served.default, self.served.versions.values()
        names = [version.name for version in open_ones if version.is_open]
        listed = [
            {"id": name, "object": "model", "created": 0, "owned_by": "qwen3ft"}
            for name in (self.served.default_names[-1], *names)
        ]
        if default is not None:
            listed[0]["root"] = default.name
        return listed

    def _models(self) -> Response:
        return JSONResponse({"object": "list", "data": self._list()})

    def _health(self) -> Response:
        default = self.served.default
        if default is None:
            return JSONResponse({"status": "starting"}, 503, {"Retry-After": "1"})
        return JSONResponse({"status": "ready", "model": default.name})

    def _metrics(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


def _no_such_route(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        QuestionError(error.status_code, f"{error.detail}.").body(), error.status_code
    )


class _Asking:
    """ASGI application of one route that answers questions."""

    def __init__(self, front: Front, kind: type[Body]) -> None:
        self._front, self._kind = front, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        version: Version | None = None
        answer: _Answer | None = None
        is_probe = False
        try:
            self._front.require_access(request)
            body, ignored = parse_body(await self._read(request), self._kind)
            probe = request.headers.get(PROBE_HEADER, "")
            is_probe = secrets.compare_digest(probe.encode(), self._front.probe_secret.encode())
            version = self._front.choose(body.model, is_probe=is_probe)
            with version.held(), self._front.counted(is_probe=is_probe):
                answer = _Answer(self._front, version, body, ignored)
                status = await answer.send_while_wanted(receive, send)
        except QuestionError as error:
            status = error.status
            headers = {}
            if status in (429, 503):
                headers["Retry-After"] = str(self._front.retry_seconds())
            await JSONResponse(error.body(), status, headers)(scope, receive, send)
        except ClientDisconnect:
            status = CLIENT_LEFT
        if not is_probe:
            self._front.note(version, status)
            if answer is not None:
                answer.report(status)

    async def _read(self, request: Request) -> Any:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise QuestionError(415, "The Content-Type has to be application/json.")
        most, content = self._front.most_body_bytes(), bytearray()
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise QuestionError(
                    413, f"The body is longer than {most:,} bytes.", code="context_length_exceeded"
                )
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise QuestionError(400, "The body is not JSON.") from None


class _Answer:
    """One answer on its way to its client."""

    def __init__(self, front: Front, version: Version, body: Body, ignored: list[str]) -> None:
        self._front, self._version, self._body = front, version, body
        self._headers = {IGNORED_HEADER: ", ".join(ignored)} if ignored else {}
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

    def report(self, status: int) -> None:
        """Tell the observers how it ended, unless the question was refused."""
        if status != 400:
            texts, seconds = self._texts, self._seconds
            answered = AnsweredRequest(
                self._version, self._body, status, **texts, ended=self._ended, seconds=seconds
            )
            for observer in self._front.observers:
                observer(answered)

    async def _send(self, send: Send) -> int:
        ask = self._body.ask(self._version.name)
        async with aclosing(self._version.engine.answer(ask)) as answering:
            try:
                first = await anext(answering)
            except RefusedQuestionError as error:
                refused = error.refusal
                raise QuestionError(400, refused.message, code=refused.code) from None
            except FinetuneError as error:
                logger.error("a request failed: %s", error)
                raise QuestionError(503, error.what, code="engine_lost") from None
            self._front.metrics.first_seconds.labels(self._version.name).observe(self._seconds)
            pieces = self._noted(first, answering)
            if self._body.stream:
                return await self._send_stream(send, pieces)
            try:
                async for piece in pieces:
                    ended = piece
            except FinetuneError as error:
                raise QuestionError(503, error.what, code="engine_lost") from None
            assert isinstance(ended, Ended)
            await _send_json(send, self._whole(ended), self._headers)
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
        front, name, self._ended = self._front, self._version.name, ended
        front.metrics.seconds.labels(name).observe(self._seconds)
        front.answer_seconds += 0.05 * (self._seconds - front.answer_seconds)
        front.metrics.tokens.labels(name, "prompt").inc(ended.prompt_tokens)
        front.metrics.tokens.labels(name, "completion").inc(ended.completion_tokens)

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
