"""The server's front: OpenAI's chat completions, completions and models over HTTP."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qwen3ft.server.access import Access
from qwen3ft.server.answers import CLIENT_LEFT, AnsweredRequest, OutgoingAnswer
from qwen3ft.server.metrics import ServerMetrics
from qwen3ft.server.questions import (
    Body,
    ChatQuestionBody,
    QuestionError,
    TextQuestionBody,
    load_body,
    parse_body,
    shown,
)
from qwen3ft.server.served import Served, Version

PROBE_HEADER = "x-qwen3ft-probe"
IGNORED_HEADER = "x-qwen3ft-ignored"

BYTES_PER_TOKEN = 32
"""Bytes of a body for each token of the context: any text that fits is shorter, even escaped."""

LEAST_BODY_BYTES = 2**16
MOST_RETRY_SECONDS = 60

BODY_SECONDS = 60.0
"""Longest time for a body to arrive."""


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
        self.app.router.redirect_slashes = False  # to an address that the client's Host names

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
            if not is_probe:
                self.require_room(version)
            return version
        if self.served.default is None:
            raise QuestionError(503, "No version is ready yet.", code="not_ready")
        names = ", ".join(model["id"] for model in self._list())
        raise QuestionError(
            404,
            f"There is no model {shown(str(name))}; there are {names}.",
            param="model",
            code="model_not_found",
        )

    def require_room(self, version: Version | None) -> None:
        """Raise QuestionError if too many requests wait; `version` tells the slots, if any."""
        if version is None:
            return
        most = version.engine.slots + self.queue
        if self.in_progress >= most:
            raise QuestionError(
                429,
                f"{self.in_progress} requests are in progress; the limit is {most}.",
                code="queue_full",
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

    def report(self, answered: AnsweredRequest) -> None:
        """Tell the observers of an answer that is over."""
        self.answer_seconds += 0.05 * (answered.seconds - self.answer_seconds)
        for observer in self.observers:
            observer(answered)

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
    body = QuestionError(error.status_code, f"{error.detail}.").body()
    return JSONResponse(body, error.status_code, error.headers)


class _Asking:
    """ASGI application of one route that answers questions."""

    def __init__(self, front: Front, kind: type[Body]) -> None:
        self._front, self._kind = front, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        version: Version | None = None
        answer: OutgoingAnswer | None = None
        is_probe = False
        try:
            self._front.require_access(request)
            probe = request.headers.get(PROBE_HEADER, "")
            is_probe = secrets.compare_digest(probe.encode(), self._front.probe_secret.encode())
            if not is_probe:  # what is refused for want of room is not read, so it costs little
                self._front.require_room(self._front.served.default)
            body, ignored = parse_body(await self._read(request), self._kind)
            version = self._front.choose(body.model, is_probe=is_probe)
            with version.held(), self._front.counted(is_probe=is_probe):
                named = {IGNORED_HEADER: ", ".join(ignored)} if ignored else {}
                # the clients wait for the new version behind its probe
                answer = OutgoingAnswer(version, body, self._front.metrics, named, ahead=is_probe)
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
            if answer is not None and status != 400:
                self._front.report(answer.outcome(status))

    async def _read(self, request: Request) -> Any:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind.lower() != "application/json":
            raise QuestionError(415, "The Content-Type has to be application/json.")
        most, content = self._front.most_body_bytes(), bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    content += part
                    if len(content) > most:
                        raise _too_long(most)
        except TimeoutError:
            message = f"The body did not arrive within {BODY_SECONDS:.0f} s."
            raise QuestionError(408, message) from None
        return load_body(bytes(content))


def _too_long(most_bytes: int) -> QuestionError:
    message = f"The body is longer than {most_bytes:,} bytes."
    return QuestionError(413, message, code="context_length_exceeded")
