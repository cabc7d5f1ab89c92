"""Addresses of servers that texts from here, and a key, are sent to."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


def checked_endpoint(url: str) -> str:
    """Return `url` without its last slash if held-out texts and an API key may be sent there.

    Raises:
        ValueError: it is not https (or http to this machine or a private address), or has more
            than scheme, host, port and path.
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("a URL has no spaces and nothing but ASCII (xn--... for other names)")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a base URL is needed, such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or "?" in url or "#" in url:
        # settings are stored and shown, so a key must not be part of them
        raise ValueError("only scheme, host, port and path are allowed; a key is never in a URL")
    _ = parts.port  # raises ValueError if it is not a port
    if parts.scheme == "http" and not _is_private(parts.hostname):
        raise ValueError(
            "http is allowed only to localhost or an address of a private network (10.0.0.5), "
            "because a name could lead anywhere; use https elsewhere"
        )
    return url.rstrip("/")


def _is_private(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or (
        address.is_private and not address.is_link_local and not address.is_unspecified
    )
