"""Which addresses texts and keys may be sent to: told from the URL, nothing is looked up."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit


def check_endpoint(url: str) -> str:
    """`url` without its last slash, if texts and a key may be sent there.

    Raises:
        ValueError: no https (or http to this machine or an address of a private network), or there
            is more in it than scheme, host, port and path.
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("a URL has no spaces and nothing but ASCII (xn--... for other names)")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("a base URL is needed, such as http://127.0.0.1:8000/v1")
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise ValueError("scheme, host, port and path alone: settings are kept, so no key is in it")
    _ = parts.port  # ValueError if it is none
    if parts.scheme == "http" and not _is_in_the_house(parts.hostname):
        raise ValueError(
            "http goes to localhost or to an address of a private network (10.0.0.5) alone, "
            "elsewhere it is https; a name could lead anywhere"
        )
    return url.rstrip("/")


def _is_in_the_house(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or (
        address.is_private and not address.is_link_local and not address.is_unspecified
    )
