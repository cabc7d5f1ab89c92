"""A guard before both servers, as ASGI middleware: who may send what, and from which page.

Loopback is open to every user of the machine, and to every web page that a browser on it shows. So
a request passes if all of this holds; whatever else it asks for is refused before the server sees
it.

1. Its Host is this machine by a loopback name. The name of a foreign page that was made to resolve
   to 127.0.0.1 is not.
2. It comes from no page, or from one of this very server. Other ports of localhost are foreign too.
   Only a link may lead here from elsewhere, to a page and not to the API.
3. What it writes is JSON, which a foreign page cannot send without asking first. Uploads of files,
   where a server takes them, carry the secret in a header, which has the same effect.
4. It holds the secret: a program in the header Authorization, a browser in a cookie that it gets by
   opening a link with the secret. The link leads on to the address without it at once.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.secret import TOKEN, authorization, digest
from deployments.services import HOSTS

COOKIE_SECONDS = 30 * 86400
"""Life of a browser's cookie."""

_READS = ("GET", "HEAD", "OPTIONS")
_PRIVATE = (
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("Content-Security-Policy", "default-src 'none'"),
)
_SIGN_IN = (
    "Open this server once by a link that `qwen3ft status` prints. "
    "Programs outside the project folder need what `qwen3ft env` prints."
)
_SIGN_IN_PAGE = f"<!doctype html><title>qwen3ft</title><p>{_SIGN_IN}"
_HTML = "text/html; charset=utf-8"
# A browser sends no Strict cookie along a link from another site, but does when the page reloads.
_RELOAD = '<!doctype html><meta http-equiv="refresh" content="0">'


@dataclass(frozen=True)
class Answer:
    """Answer that the guard gives in place of the server."""

    status: int
    body: str = ""
    content_type: str = _HTML
    headers: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def refusal(status: int, reason: str) -> Answer:
        """Return a refusal in the form that clients of both servers read."""
        return Answer(status, json.dumps({"detail": reason, "message": reason}), "application/json")


class Guard:
    """An ASGI application that passes on to `app` what may reach it.

    Args:
        app: The server's application. It is told the secret in the header Authorization.
        secret: The stack's secret.
        is_page: Tells by its path what links from elsewhere may lead to; nothing there may have
            side effects.
        uploads: Beginnings of paths that take other content than JSON.
        closed: Parts of paths that lead to nothing here, whoever asks.
        sockets_sign_in: The application itself asks for the secret on each web socket.
    """

    def __init__(
        self,
        app: ASGIApp,
        secret: str,
        *,
        is_page: Callable[[str], bool],
        uploads: Sequence[str] = (),
        closed: Sequence[str] = (),
        sockets_sign_in: bool = False,
    ) -> None:
        if not secret:
            raise ValueError("a server without a secret would be open to everybody")
        self._app, self._secret = app, secret
        self._authorization, self._cookie = authorization(secret), f"qwen3ft-{digest(secret)}"
        self._is_page, self._uploads, self._closed = is_page, tuple(uploads), tuple(closed)
        self._sockets_sign_in = sockets_sign_in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application do so."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request = _Request(scope)
        if request.token is not None:
            request.forget_token()  # whatever comes of it, the server's log has the address
        answer = self._answer(request)
        if answer is None:
            asks_itself = request.is_socket and self._sockets_sign_in
            await self._app(scope if asks_itself else self._signed(scope), receive, send)
        elif request.is_socket:
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _send(send, answer)

    def _answer(self, request: _Request) -> Answer | None:
        """Return the guard's own answer; None if the request may pass."""
        if request.repeats is not None:
            return Answer.refusal(400, f"The header {request.repeats} is there more than once.")
        if request.host not in [f"{host}:{request.port}" for host in HOSTS]:
            return Answer.refusal(403, "The Host is not this server's.")
        opened = request.opens_a_page and self._is_page(request.path)
        if request.is_foreign and not (opened and request.origin is None):
            return Answer.refusal(403, "Pages of other origins may not use this server.")
        in_header = _same(request.header("authorization"), self._authorization)
        uploads = in_header and request.path.startswith(self._uploads)
        if request.writes and not uploads and request.content_type != "application/json":
            return Answer.refusal(415, "What is written has to be application/json.")
        if request.token is not None and request.method == "GET" and self._is_page(request.path):
            return self._sign_in(request)
        if in_header or self._is_secret(request.cookie(self._cookie)):
            is_closed = any(part in request.path.lower() for part in self._closed)
            return Answer.refusal(404, "That is switched off here.") if is_closed else None
        if request.is_socket and self._sockets_sign_in:
            return None
        if opened and request.is_foreign:
            return Answer(200, _RELOAD)
        return Answer(401, _SIGN_IN_PAGE) if opened else Answer.refusal(401, _SIGN_IN)

    def _sign_in(self, request: _Request) -> Answer:
        """Give the browser its cookie, and send it to the address without the secret."""
        address = request.forget_token()
        if not (self._is_secret(request.token) or self._is_secret(request.cookie(self._cookie))):
            return Answer(401, _SIGN_IN_PAGE)
        cookie = f"{self._cookie}={self._secret}; Path=/; HttpOnly; SameSite=Strict"
        cookie = f"{cookie}; Max-Age={COOKIE_SECONDS}"
        return Answer(303, headers=(("Location", address), ("Set-Cookie", cookie)))

    def _is_secret(self, given: str | None) -> bool:
        return _same(given, self._secret)

    def _signed(self, scope: Scope) -> Scope:
        kept = [header for header in scope["headers"] if header[0] != b"authorization"]
        return {**scope, "headers": [*kept, (b"authorization", self._authorization.encode())]}


class _Request:
    """The parts of a request that decide; absent headers are None."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            self._headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        self.is_socket = scope["type"] == "websocket"
        self.method = scope.get("method", "GET")
        self.path: str = scope["path"]
        self.port: int = scope["server"][1]
        self._query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        self.token = dict(self._query).get(TOKEN)

    def header(self, name: str) -> str | None:
        return self._headers.get(name, [None])[0]

    def cookie(self, name: str) -> str | None:
        pairs = (pair.strip().partition("=") for pair in (self.header("cookie") or "").split(";"))
        return next((value for found, _, value in pairs if found == name), None)

    @property
    def repeats(self) -> str | None:
        """A header that decides and is there twice: the server might read the other one."""
        decides = ("host", "origin", "authorization", "content-type", "sec-fetch-site")
        return next((name for name in decides if len(self._headers.get(name, ())) > 1), None)

    @property
    def host(self) -> str | None:
        return self.header("host")

    @property
    def origin(self) -> str | None:
        return self.header("origin")

    @property
    def is_foreign(self) -> bool:
        """True if a page of another origin is behind it, as far as the browser says."""
        if self.origin not in (None, f"http://{self.host}"):
            return True
        return self.header("sec-fetch-site") not in (None, "same-origin", "none")

    @property
    def opens_a_page(self) -> bool:
        """True if a browser asks for it to show it in a tab of its own."""
        if self.is_socket or self.method not in ("GET", "HEAD"):
            return False
        purpose = self.header("sec-fetch-mode"), self.header("sec-fetch-dest")
        if purpose == (None, None):  # an older browser
            return "text/html" in (self.header("accept") or "")
        return purpose == ("navigate", "document")

    @property
    def writes(self) -> bool:
        """True if it has a content, or names a type of one, and does more than read."""
        if self.is_socket or self.method in _READS:
            return False
        length = self.header("content-length")
        return (
            length not in (None, "0")
            or self.header("transfer-encoding") is not None
            or self.header("content-type") is not None
        )

    @property
    def content_type(self) -> str:
        return (self.header("content-type") or "").partition(";")[0].strip().lower()

    def forget_token(self) -> str:
        """Return the address without the secret, and keep that out of the server's log."""
        query = urlencode([item for item in self._query if item[0] != TOKEN])
        self._scope["query_string"] = query.encode()
        raw_path = self._scope.get("raw_path") or self.path.encode()
        path = "/" + raw_path.decode("latin-1").lstrip("/\\")  # //host would lead elsewhere
        return f"{path}?{query}" if query else path


def _same(given: str | None, expected: str) -> bool:
    return given is not None and hmac.compare_digest(given.encode(), expected.encode())


async def _send(send: Send, answer: Answer) -> None:
    body = answer.body.encode()
    length = ("Content-Length", str(len(body)))
    headers = [("Content-Type", answer.content_type), length, *_PRIVATE, *answer.headers]
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
