"""What the guard before both servers lets through, request by request, without a server."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from deployments import mlflow_server
from deployments.guard import Guard
from deployments.secret import authorization, digest, make_secret, read_secret, sign_in_link

SECRET = "the-secret"
HOST = "127.0.0.1:4200"
OWN = f"http://{HOST}"
TOLD = {"authorization": authorization(SECRET)}
COOKIE = {"cookie": f"other=1; qwen3ft-{digest(SECRET)}={SECRET}"}
JSON = {"content-type": "application/json", "content-length": "2"}
NAVIGATES = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
LINKED = {**NAVIGATES, "sec-fetch-site": "cross-site"}
CREATE = "/api/deployments/1/create_flow_run"

Headers = dict[str, str] | list[tuple[str, str]]


class Server:
    """An application that records what reaches it, behind a guard."""

    def __init__(self, **options: Any) -> None:
        self.reached: list[dict[str, Any]] = []
        options = {"is_page": lambda path: not path.startswith("/api"), **options}
        self.guard = Guard(self._app, SECRET, **options)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached.append(scope)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"reached"})

    def ask(
        self,
        method: str = "GET",
        target: str = "/api/flow_runs/1",
        headers: Headers | None = None,
        host: str | None = HOST,
        kind: str = "http",
    ) -> tuple[int, dict[str, str], str]:
        """Return status, headers and body of the answer; the code of a socket that is closed."""
        path, _, query = target.partition("?")
        pairs = list(headers.items() if isinstance(headers, dict) else headers or ())
        pairs += [("host", host)] if host is not None else []
        self.scope = {
            "type": kind,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "server": ("127.0.0.1", 4200),
            "headers": [(name.encode(), value.encode()) for name, value in pairs],
        }
        if kind == "http":
            self.scope["method"] = method
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request"}

        asyncio.run(self.guard(self.scope, receive, send))
        if not sent or sent[0]["type"] == "websocket.close":
            return (sent[0]["code"] if sent else 0), {}, ""
        found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], found, sent[1]["body"].decode()


@pytest.fixture
def server() -> Server:
    """Make a server like Prefect's."""
    return Server()


PASSES: dict[str, tuple[str, str, Headers]] = {
    "a program reads": ("GET", "/api/flow_runs/1", TOLD),
    "a program writes": ("POST", CREATE, {**TOLD, **JSON}),
    "a program writes, with a charset": (
        "POST",
        CREATE,
        {**TOLD, "content-type": "Application/JSON; charset=utf-8", "content-length": "2"},
    ),
    "a program writes nothing": ("POST", CREATE, TOLD),
    "a program deletes": ("DELETE", "/api/flow_runs/1", TOLD),
    "its own page reads": ("GET", "/api/flow_runs/1", {**COOKIE, "sec-fetch-site": "same-origin"}),
    "its own page writes": ("POST", CREATE, {**COOKIE, **JSON, "origin": OWN}),
    "a typed address": ("GET", "/v2/runs", {**COOKIE, **NAVIGATES, "sec-fetch-site": "none"}),
    "a link on MLflow's page": (
        "GET",
        "/v2/runs",
        {**COOKIE, **NAVIGATES, "sec-fetch-site": "same-site"},
    ),
}


@pytest.mark.parametrize("case", PASSES)
def test_who_holds_the_secret_reaches_the_server(server: Server, case: str) -> None:
    """Programs hold it in a header, the server's own pages in a cookie."""
    method, target, headers = PASSES[case]
    assert server.ask(method, target, headers)[0] == 200
    [scope] = server.reached
    told = [value for name, value in scope["headers"] if name == b"authorization"]
    assert told == [authorization(SECRET).encode()]


REFUSED: dict[str, tuple[int, str, str, Headers, str | None]] = {
    "no secret": (401, "GET", "/api/flow_runs/1", {}, HOST),
    "health, without the secret": (401, "GET", "/api/health", {}, HOST),
    "another secret": (401, "GET", "/api/x", {"authorization": authorization("other")}, HOST),
    "the secret as a bearer": (401, "GET", "/api/x", {"authorization": f"Bearer {SECRET}"}, HOST),
    "another cookie": (401, "GET", "/api/x", {"cookie": f"qwen3ft-{digest(SECRET)}=x"}, HOST),
    "a cookie of another name": (401, "GET", "/api/x", {"cookie": f"qwen3ft={SECRET}"}, HOST),
    "no host": (403, "GET", "/api/x", TOLD, None),
    "a foreign host": (403, "GET", "/api/x", TOLD, "evil.example:4200"),
    "a foreign host without port": (403, "GET", "/api/x", TOLD, "evil.example"),
    "a host that begins alike": (403, "GET", "/api/x", TOLD, "127.0.0.1.evil.example:4200"),
    "a host with a user": (403, "GET", "/api/x", TOLD, "127.0.0.1:4200@evil.example"),
    "another port's host": (403, "GET", "/api/x", TOLD, "127.0.0.1:5000"),
    "two hosts": (400, "GET", "/api/x", [*TOLD.items(), ("host", "evil.example")], HOST),
    "a foreign origin": (403, "POST", CREATE, {**TOLD, **JSON, "origin": "http://evil"}, HOST),
    "another port's origin": (
        403,
        "POST",
        CREATE,
        {**COOKIE, **JSON, "origin": "http://127.0.0.1:5000"},
        HOST,
    ),
    "the other name's origin": (
        403,
        "POST",
        CREATE,
        {**COOKIE, **JSON, "origin": "http://localhost:4200"},
        HOST,
    ),
    "the origin over TLS": (
        403,
        "POST",
        CREATE,
        {**COOKIE, **JSON, "origin": f"https://{HOST}"},
        HOST,
    ),
    "no origin but a page": (403, "POST", CREATE, {**COOKIE, **JSON, "origin": "null"}, HOST),
    "two origins": (
        400,
        "POST",
        CREATE,
        [*COOKIE.items(), *JSON.items(), ("origin", OWN), ("origin", "http://evil")],
        HOST,
    ),
    "a preflight": (403, "OPTIONS", CREATE, {"origin": "http://evil"}, HOST),
    "an image on another page": (403, "GET", "/x", {**COOKIE, "sec-fetch-site": "same-site"}, HOST),
    "a frame on another page": (
        403,
        "GET",
        "/v2/runs",
        {
            **COOKIE,
            "sec-fetch-site": "same-site",
            "sec-fetch-mode": "navigate",
            "sec-fetch-dest": "iframe",
        },
        HOST,
    ),
    "a link to the API": (403, "GET", "/api/csrf-token?client=x", {**COOKIE, **LINKED}, HOST),
    "a form that another page sends": (
        403,
        "POST",
        "/v2/runs",
        {**COOKIE, **LINKED, "origin": "http://evil"},
        HOST,
    ),
    "no content type": (415, "POST", CREATE, {**COOKIE, "content-length": "2"}, HOST),
    "no content type, in chunks": (
        415,
        "POST",
        CREATE,
        {**COOKIE, "transfer-encoding": "chunked"},
        HOST,
    ),
    "a form": (
        415,
        "POST",
        CREATE,
        {**COOKIE, "content-type": "application/x-www-form-urlencoded", "content-length": "2"},
        HOST,
    ),
    "text": (415, "PUT", CREATE, {**COOKIE, "content-type": "text/plain"}, HOST),
    "text that says json": (
        415,
        "PATCH",
        CREATE,
        {**COOKIE, "content-type": "text/plain; application/json"},
        HOST,
    ),
    "two content types": (
        400,
        "POST",
        CREATE,
        [*COOKIE.items(), *JSON.items(), ("content-type", "text/plain")],
        HOST,
    ),
    "no content type, by a program": (415, "POST", CREATE, {**TOLD, "content-length": "2"}, HOST),
}


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_refused_before_the_server_sees_it(server: Server, case: str) -> None:
    """No answer lets a browser read it, remember a password or ask for one."""
    status, method, target, headers, host = REFUSED[case]
    given, told, _ = server.ask(method, target, headers, host)
    assert given == status
    assert server.reached == []
    assert not {"access-control-allow-origin", "www-authenticate", "set-cookie"} & set(told)


def test_the_link_gives_a_cookie_and_leads_to_the_address_without_the_secret(
    server: Server,
) -> None:
    """The server's log, which shows the request's address, never has it either."""
    link = sign_in_link(f"{OWN}/v2/runs?page=1&name=a%20b", SECRET)
    target = link.removeprefix(OWN)
    status, told, _ = server.ask("GET", target, {**NAVIGATES, "sec-fetch-site": "none"})
    assert (status, told["location"]) == (303, "/v2/runs?page=1&name=a+b")
    assert re.search("HttpOnly; SameSite=Strict", told["set-cookie"])
    assert told["referrer-policy"] == "no-referrer"
    assert SECRET.encode() not in server.scope["query_string"]
    cookie = told["set-cookie"].partition(";")[0]
    assert server.ask("GET", told["location"], {"cookie": cookie, **NAVIGATES})[0] == 200


def test_a_link_keeps_the_fragment_that_mlflow_puts_its_pages_in() -> None:
    """The secret stands before it, where the server sees it."""
    link = sign_in_link("http://127.0.0.1:5000/#/experiments/1?type=x", SECRET)
    assert link == f"http://127.0.0.1:5000/?token={SECRET}#/experiments/1?type=x"
    assert sign_in_link("http://127.0.0.1:5000", SECRET) == f"http://127.0.0.1:5000/?token={SECRET}"


@pytest.mark.parametrize("target", ["/v2?token=wrong", "/v2?token=", "/v2?token=the-secret2"])
def test_a_wrong_link_signs_nobody_in(server: Server, target: str) -> None:
    """A browser that is signed in is led on all the same."""
    status, told, body = server.ask("GET", target, NAVIGATES)
    assert (status, "set-cookie" in told) == (401, False)
    assert "qwen3ft status" in body
    assert server.ask("GET", target, {**COOKIE, **NAVIGATES})[0] == 303


def test_the_secret_opens_no_api_by_its_address(server: Server) -> None:
    """Addresses are kept in histories and logs."""
    assert server.ask("GET", f"/api/flow_runs/1?token={SECRET}")[0] == 401


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("HEAD", "/", NAVIGATES),
        ("GET", "/api/flow_runs/1", {}),
        ("GET", "/api/flow_runs/1", TOLD),
        ("POST", CREATE, {}),
        ("GET", "/v2", {"host": "evil"}),
    ],
)
def test_no_request_shows_the_secret_to_the_servers_log(
    server: Server, method: str, path: str, headers: Headers
) -> None:
    """It writes the address of each, refused ones too."""
    server.ask(method, f"{path}?a=1&token={SECRET}", headers)
    assert server.scope["query_string"] == b"a=1"


def test_the_link_leads_to_no_other_server(server: Server) -> None:
    """An address that begins with two slashes would."""
    for path in ("//evil.example", "/\\evil.example", "///evil.example"):
        location = server.ask("GET", f"{path}?token={SECRET}", NAVIGATES)[1]["location"]
        assert location == "/evil.example"


def test_a_link_from_another_site_works_for_a_browser_that_is_signed_in(server: Server) -> None:
    """The browser holds back its cookie there, so the page reloads itself, once."""
    status, _, body = server.ask("GET", "/v2/runs", LINKED)
    assert (status, 'http-equiv="refresh"' in body, server.reached) == (200, True, [])
    again = {**NAVIGATES, "sec-fetch-site": "same-origin"}
    assert server.ask("GET", "/v2/runs", again)[0] == 401
    assert server.ask("GET", "/v2/runs", {**again, **COOKIE})[0] == 200


@pytest.mark.parametrize("signs_in", [True, False])
def test_a_web_socket_of_a_foreign_page_is_closed(signs_in: bool) -> None:
    """Without an origin it is a program, which Prefect's server asks for the secret itself."""
    server = Server(sockets_sign_in=signs_in)
    for headers in ({"origin": "http://evil"}, {**COOKIE, "origin": "http://127.0.0.1:5000"}):
        assert server.ask(target="/api/events/in", headers=headers, kind="websocket")[0] == 1008
    assert server.ask(target="/x", headers=TOLD, host="evil:4200", kind="websocket")[0] == 1008
    assert server.reached == []
    unsigned = server.ask(target="/api/events/in", kind="websocket")
    assert (unsigned[0], len(server.reached)) == ((0, 1) if signs_in else (1008, 0))
    assert b"authorization" not in [
        name for scope in server.reached for name, _ in scope["headers"]
    ]
    server.ask(target="/api/events/in", headers=TOLD, kind="websocket")
    assert server.reached


def test_files_are_uploaded_by_who_holds_the_secret_in_a_header() -> None:
    """A page of another origin cannot send that header; a cookie goes along by itself."""
    server = Server(uploads=("/api/artifacts/",))
    file = {"content-type": "application/octet-stream", "content-length": "2"}
    assert server.ask("PUT", "/api/artifacts/a", {**COOKIE, **file})[0] == 415
    assert server.ask("PUT", "/api/artifacts", {**TOLD, **file})[0] == 415
    assert server.reached == []
    assert server.ask("PUT", "/api/artifacts/a", {**TOLD, **file})[0] == 200


def test_a_guard_needs_a_secret() -> None:
    """An empty one would let everybody in."""
    with pytest.raises(ValueError, match="open to everybody"):
        Guard(lambda *_: None, "", is_page=lambda _: True)  # type: ignore[arg-type, return-value]


def test_a_secret_is_made_once_and_only_its_owner_reads_it(tmp_path: Any) -> None:
    """Each folder has its own."""
    other = tmp_path / "other"
    secret = make_secret(tmp_path)
    assert (make_secret(tmp_path), read_secret(tmp_path)) == (secret, secret)
    assert len(secret) >= 40
    assert make_secret(other) != secret
    path = tmp_path / ".qwen3ft" / "secret"
    path.chmod(0o644)
    make_secret(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "target", ["/ajax-api/3.0/mlflow/assistant/message", "/API/3.0/mlflow/Assistant/config"]
)
def test_what_is_switched_off_answers_nobody(target: str) -> None:
    """MLflow's assistant would run commands on this machine."""
    server = Server(closed=mlflow_server.CLOSED)
    assert server.ask("POST", target, {**TOLD, **JSON})[0] == 404
    assert server.ask("GET", target, COOKIE)[0] == 404
    assert not server.reached


def test_all_of_the_assistant_is_switched_off() -> None:
    """Under whatever address this version of MLflow has it."""
    from mlflow.server.assistant.api import assistant_router

    paths = [getattr(route, "path", "") for route in assistant_router.routes]
    assert len(paths) > 5
    assert all(any(part in path for part in mlflow_server.CLOSED) for path in paths)
