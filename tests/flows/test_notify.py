"""Notifications through real blocks to real HTTP and SMTP servers on loopback."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from queue import Queue
from typing import Any

import pytest
from prefect import flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.blocks.webhook import Webhook
from prefect.runtime import flow_run
from prefect.testing.utilities import prefect_test_harness

from flows import notify
from flows.notify import EmailNotification, Notice, send_notice
from qwen3ft.config import TrainingConfig
from qwen3ft.errors import ConfigError

NOTICE = Notice(event="promoted", run_id="r1", model="embedded", message="better: 85.8%")


@pytest.fixture
def endpoint() -> Iterator[tuple[str, Queue[Any]]]:
    """An HTTP server's address, and what is posted to it."""
    received: Queue[Any] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if self.path == "/broken" else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()


def _serve_smtp(listener: socket.socket, received: Queue[str]) -> None:
    connection, _ = listener.accept()
    with connection, connection.makefile("rw", encoding="utf-8", newline="\r\n") as stream:

        def say(line: str) -> None:
            stream.write(line + "\r\n")
            stream.flush()

        say("220 test")
        for line in stream:
            command = line[:4].upper()
            if command == "DATA":
                say("354 go on")
                received.put("".join(iter(stream.readline, ".\r\n")))
            say("250 ok")
            if command == "QUIT":
                return


@pytest.fixture
def mailbox() -> Iterator[tuple[int, Queue[str]]]:
    """An SMTP server's port, and the mail it takes."""
    received: Queue[str] = Queue()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve_smtp, args=(listener, received), daemon=True)
        thread.start()
        yield listener.getsockname()[1], received


def config(*blocks: str, **changes: Any) -> TrainingConfig:
    return TrainingConfig(model_name="embedded", notify_blocks=blocks, **changes)


def test_a_webhook_a_chat_and_a_mailbox_are_told_at_once(
    endpoint: tuple[str, Queue[Any]], mailbox: tuple[int, Queue[str]]
) -> None:
    """Each gets subject and message in its own form."""
    url, received = endpoint
    port, mail = mailbox
    text = {"text": "{{subject}}: {{body}}"}
    address = f"mailto://127.0.0.1:{port}?from=q@example.org&to=ops@example.org&mode=insecure"
    blocks = {
        "webhook/ops": Webhook(url=url),
        "custom-webhook/ops": CustomWebhookNotificationBlock(name="ops", url=url, json_data=text),
        "e-mail/ops": EmailNotification(url=address),
    }
    send_notice(config(*blocks), NOTICE, blocks.__getitem__)
    posted = [received.get(timeout=5) for _ in range(2)]
    assert NOTICE.model_dump(mode="json") in posted
    assert {"text": "qwen3ft: embedded promoted: better: 85.8%"} in posted
    letter = mail.get(timeout=5)
    assert "Subject: qwen3ft: embedded promoted" in letter
    assert "ops@example.org" in letter


def test_an_end_that_nobody_asked_for_is_not_told(endpoint: tuple[str, Queue[Any]]) -> None:
    """`notify_on` chooses."""
    url, received = endpoint
    blocks = {"webhook/ops": Webhook(url=url)}
    send_notice(config(*blocks, notify_on=("failed",)), NOTICE, blocks.__getitem__)
    assert received.empty()


def test_dead_endpoints_fail_nothing_and_keep_nobody_from_being_told(
    endpoint: tuple[str, Queue[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody listens, a server's error, no such block, one of another kind: each is a warning."""
    url, received = endpoint
    blocks = {
        "webhook/dead": Webhook(url="http://127.0.0.1:9"),
        "webhook/broken": Webhook(url=f"{url}/broken"),
        "secret/unfit": Secret(value="x"),
        "webhook/alive": Webhook(url=url),
    }
    names = ("webhook/dead", "webhook/broken", "webhook/none", "secret/unfit", "webhook/alive")
    with caplog.at_level("WARNING", logger="qwen3ft.notify"):
        send_notice(config(*names), NOTICE, blocks.__getitem__)
    assert [name for name in names if name in caplog.text] == list(names[:4])
    assert received.get(timeout=5) == received.get(timeout=5) == NOTICE.model_dump(mode="json")


def test_an_endpoint_that_never_answers_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It accepts the connection and never answers; the run ends all the same."""
    monkeypatch.setattr(notify, "NOTIFY_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        block = Webhook(url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with caplog.at_level("WARNING", logger="qwen3ft.notify"):
            send_notice(config("webhook/silent"), NOTICE, {"webhook/silent": block}.__getitem__)
        assert time.monotonic() - started < 3.0
    assert "webhook/silent did not accept the notification: TimeoutError" in caplog.text


@pytest.mark.slow
def test_a_failed_flow_run_is_told_by_prefects_hook(endpoint: tuple[str, Queue[Any]]) -> None:
    """The notice has the error's message and the id to continue with.

    An unfinished night is resumed by another flow run, in the folder of the first.
    """
    url, received = endpoint

    @flow(on_failure=[notify.notify_failure])
    def failing(config: TrainingConfig, continue_run: str | None = None) -> None:
        if continue_run is None:
            notify.record_run(str(flow_run.id), "the night's first", config)
        raise ConfigError("3 invalid setting(s)", why="because", next_command="qwen3ft plan")

    with prefect_test_harness(server_startup_timeout=120):
        Webhook(url=url).save("hook", overwrite=True)
        with pytest.raises(ConfigError):
            failing(config("webhook/hook"), "earlier")
        with pytest.raises(ConfigError):
            failing(config("webhook/hook"))
    notice = received.get(timeout=5)
    assert received.get(timeout=5)["run_id"] == "the night's first"
    assert (notice["event"], notice["run_id"]) == ("failed", "earlier")
    assert "3 invalid setting(s)" in notice["message"]
    assert "Next: qwen3ft plan" in notice["message"]
