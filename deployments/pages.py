"""Prefect's pages, made to stay on this machine.

The second version of its UI, the one with bounds in its forms, asks amplitude.com for settings on
every page, also where the server sends no analytics. The server copies its pages into a folder of
the project (`PREFECT_SERVER_UI_STATIC_DIRECTORY`); a content security policy in the copies lets a
browser connect to this machine alone.
"""

from __future__ import annotations

from pathlib import Path

from qwen3ft.files import write_bytes_atomic

# `data:` and `blob:` leave no machine: the graph of a run loads its fonts so
ALLOWED = (
    "'self' http://127.0.0.1:* http://localhost:* ws://127.0.0.1:* ws://localhost:* data: blob:"
)
POLICY = f'<meta http-equiv="Content-Security-Policy" content="connect-src {ALLOWED}">'


def keep_local(folder: Path) -> None:
    """Put the policy into each version's page below `folder`; a page that has it stays as it is."""
    for page in folder.glob("*/index.html"):
        text = page.read_text(encoding="utf-8")
        if POLICY not in text:
            allowed = text.replace("<head>", f"<head>{POLICY}", 1)
            write_bytes_atomic(page, allowed.encode())
