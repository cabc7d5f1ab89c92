"""Access to the server: loopback for programs of this machine, elsewhere only with the key.

A web page in a browser of this machine reaches loopback too. It gets in neither by a name that was
made to resolve to 127.0.0.1, nor by a request of its own origin.
"""

from __future__ import annotations

import hmac
import secrets
from ipaddress import ip_address
from pathlib import Path

from starlette.requests import Request

from qwen3ft.disk.files import make_folder, write_bytes_atomic
from qwen3ft.server.questions import QuestionError

OPEN_PATHS = ("/health",)
"""Paths that need no key: a load balancer has none."""

_HTTP_PORT = 80  # clients leave it out of the Host


def is_loopback(host: str) -> bool:
    """Return True if only this machine reaches a server that listens on `host`."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def make_key(path: Path) -> tuple[str, bool]:
    """Return the key in the file `path`, and True if it was made now."""
    if path.exists() and (key := path.read_text(encoding="ascii").strip()):
        path.chmod(0o600)
        return key, False
    key = f"sk-{secrets.token_urlsafe(32)}"
    make_folder(path.parent, 0o700)
    write_bytes_atomic(path, key.encode())
    path.chmod(0o600)
    return key, True


class Access:
    """Decides about each request.

    Args:
        host: Address that the server listens on.
        port: Its port.
        key: Key that requests need; empty for none.
    """

    def __init__(self, host: str, port: int, key: str) -> None:
        names = ("127.0.0.1", "localhost", "[::1]", f"[{host}]" if ":" in host else host)
        ends = (f":{port}", "") if port == _HTTP_PORT else (f":{port}",)
        hosts = {name + end for name in names for end in ends}
        self._hosts = hosts if is_loopback(host) else None
        self._key = key

    def require(self, request: Request) -> None:
        """Let a request pass, or raise.

        Raises:
            QuestionError: it may not.
        """
        host, origin = request.headers.get("host"), request.headers.get("origin")
        if self._hosts is not None and host not in self._hosts:
            raise QuestionError(403, "The Host is not this server's.", code="foreign_host")
        if origin not in (None, f"http://{host}", f"https://{host}"):
            raise QuestionError(403, "Web pages may not use this server.", code="foreign_origin")
        given = request.headers.get("authorization", "")
        expected = f"Bearer {self._key}"
        if not self._key or request.url.path in OPEN_PATHS:
            return
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise QuestionError(
                401, "The header Authorization lacks this server's key.", code="invalid_api_key"
            )
