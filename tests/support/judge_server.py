"""A server that answers as a judge, for tests."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any


class JudgeServer(ThreadingHTTPServer):
    """Answers every request by `play`, and keeps what was asked."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, play: Callable[[Handler], None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.play = play
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.closing = Event()

    @property
    def url(self) -> str:
        """Value of the setting `judge_url`."""
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: JudgeServer

    def do_POST(self) -> None:  # noqa: D102
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/chat/completions"
        self.server.asked.append(json.loads(body))
        self.server.keys.append(self.headers.get("Authorization"))
        self.server.play(self)

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole response."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def say(self, text: str | None) -> None:
        """Send a chat completion."""
        choice = {"message": {"role": "assistant", "content": text}}
        self.answer(200, json.dumps({"choices": [choice]}).encode())

    def shown_first(self) -> str:
        """The answer in the first place."""
        text = self.server.asked[-1]["messages"][1]["content"]
        found = re.search(r"<<<FIRST ANSWER \w+>>>\n(.*?)\n<<<END", text, re.DOTALL)
        assert found is not None
        return found.group(1)

    def handle(self) -> None:
        """Clients that went away are no news."""
        with suppress(ConnectionError):
            super().handle()

    def log_message(self, *args: Any) -> None:
        """Nothing on standard error."""


@contextmanager
def serving(play: Callable[[Handler], None]) -> Iterator[JudgeServer]:
    """Run a server that answers by `play`."""
    server = JudgeServer(play)
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def prefers(word: str) -> Callable[[Handler], None]:
    """A judge with an opinion, whichever place it stands in."""
    return lambda handler: handler.say(
        "**First**" if handler.shown_first().startswith(word) else "<think>Hm.</think>\nsecond."
    )
