"""The secret of a stack: whoever holds it may use its servers, and so run commands as its owner.

`up` makes it once, in `.qwen3ft/secret`, which only its owner can read. Programs get it through
`services.environment` and prefect.toml, the browser by a link that `sign_in_link` makes. To change
it, delete the file and `qwen3ft up`.
"""

from __future__ import annotations

import base64
import secrets
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from qwen3ft.disk.files import write_bytes_atomic

USER = "qwen3ft"
"""User name beside the secret; the servers know no other."""

TOKEN = "token"  # noqa: S105  the name, not the value
"""Query parameter of a link that signs a browser in."""


def make_secret(root: Path) -> str:
    """Return the secret of the stack in `root`; make it if there is none."""
    path = _path(root)
    if not read_secret(root):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_bytes_atomic(path, secrets.token_urlsafe(32).encode())
    path.chmod(0o600)
    return read_secret(root)


def read_secret(root: Path) -> str:
    """Return the secret of the stack in `root`; an empty text if there is none yet."""
    try:
        return _path(root).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""


def auth_string(secret: str) -> str:
    """Return user name and secret as Prefect's settings hold them."""
    return f"{USER}:{secret}"


def authorization(secret: str) -> str:
    """Return the value of the header Authorization, the same for both servers."""
    return f"Basic {base64.b64encode(auth_string(secret).encode()).decode()}"


def digest(secret: str) -> str:
    """Return what tells secrets apart without telling them."""
    return sha256(secret.encode()).hexdigest()[:8]


def sign_in_link(url: str, secret: str) -> str:
    """Return the address `url` of a page of the stack, which signs the browser in when opened.

    It is for the terminal alone: in a record or a message it would hand the stack to every reader.
    """
    parts = urlsplit(url)
    query = "&".join(filter(None, (parts.query, f"{TOKEN}={secret}")))
    return parts._replace(path=parts.path or "/", query=query).geturl()


def _path(root: Path) -> Path:
    return root / ".qwen3ft" / "secret"
