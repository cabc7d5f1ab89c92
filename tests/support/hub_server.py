"""A hub on loopback that takes repositories: the endpoints that an upload uses, for tests."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40
TOKEN = "hf_may_write"


class HubServer(ThreadingHTTPServer):
    """Keeps repositories in memory; only `TOKEN` may write."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        """Contents of large files by their sha256."""
        self.licences: dict[str, str] = {}
        self.refused_licence = "none-of-ours"

    @property
    def url(self) -> str:
        """Value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:  # noqa: D102
        name = self.path.removeprefix("/api/models/").partition("/revision/")[0]
        if name in self.server.licences:
            card = {"license": self.server.licences[name]}
            self._say({"id": name, "sha": COMMIT, "siblings": [], "cardData": card})
        elif name in self.server.files:
            private = self.server.private[name]
            self._say({"id": name, "sha": COMMIT, "siblings": [], "private": private})
        else:
            self._say({"error": "not found"}, 404, "RepoNotFound")

    def do_PUT(self) -> None:  # noqa: D102
        content, oid = self._body(), self.path.removeprefix("/large/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.large[oid] = content
        self._say({})

    def do_POST(self) -> None:  # noqa: D102
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._say({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            is_private = asked.get("visibility", "") == "private" or bool(asked.get("private"))
            self.server.private.setdefault(name, is_private)
            self.server.files.setdefault(name, {})
            self._say({"url": f"{self.server.url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            is_refused = f"license: {self.server.refused_licence}\n" in json.loads(body)["content"]
            errors = [{"message": "no such license"}] if is_refused else []
            self._say({"warnings": [], "errors": errors}, 400 if errors else 200)
        elif self.path.endswith("/preupload/main"):
            self._say({"files": [_mode(file) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._say(self._places(json.loads(body)))
        elif self.path.endswith("/commit/main"):
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            self._commit(name, [json.loads(line) for line in body.splitlines()])
        else:
            self._say({"error": f"no endpoint {self.path}"}, 404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _places(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {
            "transfer": "basic",
            "objects": [
                {
                    **one,
                    "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}},
                }
                for one in asked["objects"]
            ],
        }

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[name][value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{COMMIT}"
        self._say({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

    def _say(self, answer: dict[str, Any], status: int = 200, code: str = "") -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing."""


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


@contextmanager
def open_hub() -> Iterator[HubServer]:
    """Run a hub until the body ends."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
