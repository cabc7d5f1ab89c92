"""A content security policy for Prefect's pages, so that they connect to their own server only.

Version 2 of its UI, the one whose forms know bounds, requests settings from amplitude.com on every
page, even if the server sends no analytics. The server copies its pages into a folder of the
project (`PREFECT_SERVER_UI_STATIC_DIRECTORY`); the policy is put into the copies.
"""

from __future__ import annotations

from pathlib import Path

from qwen3ft.disk.files import write_bytes_atomic

# `data:` and `blob:` stay on the machine; the graph of a run loads its fonts that way
ALLOWED = "'self' data: blob:"
POLICY = f'<meta http-equiv="Content-Security-Policy" content="connect-src {ALLOWED}">'


def keep_local(folder: Path) -> None:
    """Put the policy into the page of each UI version below `folder`, unless it is there."""
    for page in folder.glob("*/index.html"):
        text = page.read_text(encoding="utf-8")
        if POLICY not in text:
            allowed = text.replace("<head>", f"<head>{POLICY}", 1)
            write_bytes_atomic(page, allowed.encode())
