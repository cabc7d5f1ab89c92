"""Attacks on a stack that is up: by raw HTTP, by web sockets, and by pages in a real browser.

Each asks for a run whose command would leave a file behind. None is started, and no file is there.
"""

from __future__ import annotations

import http.client
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from support.browser import NOT_INSTALLED, PICTURES, WatchedBrowser, find_chromium, open_browser
from support.flow_project import FlowProject
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from deployments import services
from deployments.prefect_api import send
from deployments.secret import TOKEN, auth_string, authorization, digest
from deployments.services import DEPLOYMENT, SERVERS, Service
from qwen3ft.errors import EnvironmentNotReadyError
from qwen3ft.records.run_card import COMPLETED_STATES

pytestmark = pytest.mark.timeout(600)

REFUSALS = (400, 401, 403, 415)


@pytest.fixture(scope="module")
def marker(project: FlowProject) -> Path:
    """Name the file that a command would leave behind."""
    return project.root / "a-command-ran"


@pytest.fixture(scope="module")
def writes(deployment: dict[str, Any], marker: Path) -> dict[Service, tuple[str, str]]:
    """Name for each server a path that changes something, and the JSON that does."""
    command = {"job_variables": {"command": f"touch '{marker}'"}}
    return {
        "prefect": (f"/api/deployments/{deployment['id']}/create_flow_run", json.dumps(command)),
        "mlflow": ("/api/2.0/mlflow/experiments/create", json.dumps({"name": "planted"})),
    }


@pytest.fixture(autouse=True)
def nothing_happened(project: FlowProject, deployment: Any, marker: Path) -> Iterator[None]:
    """Check after each test that no run was started and no experiment made."""
    before = things(project)
    yield
    assert things(project) == before
    assert not marker.exists()


def things(project: FlowProject) -> tuple[set[str], set[str]]:
    """Return the ids of all runs, and the names of all experiments."""
    runs = send(project.stack.layout(), "flow_runs/filter", {"limit": 200})
    client = MlflowClient(project.tracking_uri)
    return {run["id"] for run in runs}, {found.name for found in client.search_experiments()}


def ask(
    project: FlowProject,
    server: Service,
    method: str,
    path: str,
    headers: dict[str, str],
    body: str | None = None,
) -> tuple[int, dict[str, str]]:
    """Send exactly these headers, and Host unless it is among them; return status and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", project.stack.layout().port(server), 30)
    connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
    if body is not None:
        headers = {"Content-Length": str(len(body)), **headers}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders(None if body is None else body.encode())
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}


JSON = {"Content-Type": "application/json"}


def cookie(project: FlowProject) -> dict[str, str]:
    """Return the header of a browser that is signed in."""
    secret = project.stack.layout().secret
    return {"Cookie": f"qwen3ft-{digest(secret)}={secret}"}


def told(project: FlowProject) -> dict[str, str]:
    """Return the header of a program that holds the secret."""
    return {"Authorization": authorization(project.stack.layout().secret)}


@pytest.mark.parametrize("server", SERVERS)
def test_a_request_without_the_secret_changes_nothing(
    project: FlowProject, writes: dict[Service, tuple[str, str]], server: Service
) -> None:
    """That is what any program of another user on this machine can send."""
    path, body = writes[server]
    wrong = {"Authorization": authorization("wrong")}
    for headers in (JSON, {}, {"Content-Type": "text/plain"}, {**JSON, **wrong}):
        assert ask(project, server, "POST", path, headers, body)[0] in REFUSALS


@pytest.mark.parametrize("server", SERVERS)
def test_a_request_that_a_foreign_page_makes_a_signed_in_browser_send_changes_nothing(
    project: FlowProject, writes: dict[Service, tuple[str, str]], server: Service
) -> None:
    """Not with the cookie, not with the secret itself; and no answer may be read by the page."""
    path, body = writes[server]
    layout = project.stack.layout()
    other: Service = "mlflow" if server == "prefect" else "prefect"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for signed in (cookie(project), told(project)):
        attempts: list[tuple[str, dict[str, str]]] = [
            ("POST", {**JSON, "Origin": "http://evil.example"}),
            ("POST", {**JSON, "Origin": layout.url(other)}),
            ("POST", {**JSON, "Origin": "null"}),
            ("POST", {**JSON, "Host": "evil.example"}),
            ("POST", {**JSON, "Host": f"rebound.example:{layout.port(server)}"}),
            ("POST", {"Content-Type": "text/plain", "Origin": "http://evil.example"}),
            ("POST", form),
            ("POST", {}),
            ("PUT", {}),
            ("OPTIONS", {"Origin": layout.url(other), "Access-Control-Request-Method": "POST"}),
        ]
        for method, headers in attempts:
            status, answer = ask(project, server, method, path, {**signed, **headers}, body)
            assert status in REFUSALS, (method, headers)
            assert "access-control-allow-origin" not in answer


def test_reading_with_side_effects_needs_to_come_from_the_server_itself(
    project: FlowProject,
) -> None:
    """Both servers have such addresses; another page can make a browser load or open them."""
    foreign = {**cookie(project), "Sec-Fetch-Site": "same-site"}
    opened = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document", "Accept": "text/html"}
    for server, path in (
        ("prefect", "/api/csrf-token?client=planted"),
        ("mlflow", "/get-artifact?path=a&run_uuid=b"),
        ("mlflow", "/ajax-api/3.0/mlflow/assistant/sessions/a/stream"),  # lets an agent go on
        ("mlflow", "/ajax-api/2.0/mlflow/experiments/search?max_results=1"),
    ):
        for headers in (foreign, {**foreign, **opened}, {}):
            assert ask(project, server, "GET", path, headers)[0] in REFUSALS  # type: ignore[arg-type]


def test_prefects_answers_name_no_origin_but_its_own(project: FlowProject) -> None:
    """By default it allows every page to read them."""
    layout = project.stack.layout()
    own = {**cookie(project), "Origin": layout.url("prefect")}
    status, answer = ask(project, "prefect", "GET", "/api/admin/version", own)
    assert (status, answer["access-control-allow-origin"]) == (200, layout.url("prefect"))


def test_what_is_written_by_who_may_write_needs_no_more_than_the_secret(
    project: FlowProject,
) -> None:
    """The refusals above do not come from a server that refuses everything."""
    layout = project.stack.layout()
    for signed in (told(project), {**cookie(project), "Origin": layout.url("prefect")}):
        body = json.dumps({"limit": 1})
        status, _ = ask(project, "prefect", "POST", "/api/flows/filter", {**signed, **JSON}, body)
        assert status == 200


# --- web sockets ---


def socket_url(project: FlowProject, path: str) -> str:
    """Return the address of a web socket of Prefect's server."""
    return project.stack.layout().url("prefect").replace("http", "ws", 1) + path


SOCKETS = ("/api/events/in", "/api/events/out", "/api/logs/out")


@pytest.mark.parametrize("path", SOCKETS)
def test_a_web_socket_of_a_foreign_page_is_not_opened(project: FlowProject, path: str) -> None:
    """Browsers let pages open web sockets to any server, and send its cookies along."""
    headers = [cookie(project), told(project), {}]
    for origin in ("http://evil.example", project.stack.layout().url("mlflow"), "null"):
        for given in headers:
            with pytest.raises(InvalidStatus, match="403"):
                connect(socket_url(project, path), origin=origin, additional_headers=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", SOCKETS)
def test_a_web_socket_answers_to_who_holds_the_secret(project: FlowProject, path: str) -> None:
    """Prefect asks for it in the first message."""
    right = auth_string(project.stack.layout().secret)
    for token, answered in (("qwen3ft:wrong", False), (None, False), (right, True)):
        with connect(socket_url(project, path), subprotocols=["prefect"]) as socket:  # type: ignore[list-item]
            socket.send(json.dumps({"type": "auth", "token": token}))
            if answered:
                assert json.loads(socket.recv(timeout=20))["type"] == "auth_success"
            else:
                with pytest.raises(Exception, match="1008"):
                    socket.recv(timeout=20)
    with pytest.raises(InvalidStatus, match="403"):
        connect(socket_url(project, path))  # a client that would not be asked


# --- what even the secret does not allow ---


def test_a_run_names_no_command_environment_or_folder(
    project: FlowProject, deployment: dict[str, Any], marker: Path
) -> None:
    """The pool's template is fixed; the server refuses whatever would change it."""
    layout = project.stack.layout()
    address = f"deployments/{deployment['id']}/create_flow_run"
    for variables in (
        {"command": f"touch '{marker}'"},
        {"env": {"PYTHONSTARTUP": "/tmp/x"}},
        {"env.PATH": "/tmp/x"},
        {"working_dir": "/tmp"},
        {"stream_output": False},
        {"unknown": 1},
    ):
        with pytest.raises(EnvironmentNotReadyError):
            send(layout, address, {"job_variables": variables})
    pool = send(layout, "work_pools/qwen3ft", method="GET")
    assert "{{" not in json.dumps(pool["base_job_template"])


# --- pages in a browser ---

ATTACK = """async ([api, mlflow, create, body]) => {
    const tried = {};
    const attempt = async (name, action) => {
        try { tried[name] = await action(); } catch (error) { tried[name] = "refused"; }
    };
    const post = (url, options) => fetch(url, {method: "POST", body, ...options});
    const bytes = new Blob([body]);  // sent without a content type
    const json = {headers: {"Content-Type": "application/json"}};
    for (const [server, url] of [["prefect", api + create], ["mlflow", mlflow]]) {
        await attempt(server + " text", async () =>
            (await post(url, {mode: "no-cors", credentials: "include"})).type);
        await attempt(server + " bytes", async () =>
            (await post(url, {body: bytes, mode: "no-cors", credentials: "include"})).type);
        await attempt(server + " json", async () =>
            (await post(url, {...json, credentials: "include"})).status);
        await attempt(server + " json of a stranger", async () => (await post(url, json)).status);
        await attempt(server + " read", async () =>
            (await fetch(url, {credentials: "include"})).status);
        await attempt(server + " beacon", async () => navigator.sendBeacon(url, bytes) && "sent");
    }
    await attempt("socket", () => new Promise((opened, failed) => {
        const socket = new WebSocket(api.replace("http", "ws") + "/api/events/in", ["prefect"]);
        socket.onopen = () => opened("opened");
        socket.onerror = failed;
    }));
    for (const url of [api + create, mlflow]) {
        const form = document.createElement("form");
        const field = document.createElement("input");
        Object.assign(form, {method: "post", action: url, enctype: "text/plain", target: "inside"});
        // sent as name=value, which makes valid JSON of it
        Object.assign(field, {name: body.slice(0, -1) + ', "x": "', value: '"}'});
        const frame = document.createElement("iframe");
        frame.name = "inside";
        form.append(field);
        document.body.append(frame, form);
        const shown = new Promise(done => { frame.onload = done; setTimeout(done, 3000); });
        form.submit();
        await shown;
    }
    return tried;
}"""


@pytest.fixture(scope="module")
def foreign_pages() -> Iterator[int]:
    """Serve an empty page on a port of this machine, like any local tool; yield the port."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<title>foreign</title><body></body>")

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.fixture(scope="module")
def browser(project: FlowProject, deployment: Any) -> Iterator[WatchedBrowser]:
    """Open one browser for the module, which is signed in."""
    with open_browser(PICTURES) as opened:
        opened.sign_in(project.stack.layout())
        yield opened


@pytest.mark.skipif(find_chromium() is None, reason=NOT_INSTALLED)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "rebound.example"])
def test_no_page_of_another_origin_gets_through_from_a_signed_in_browser(
    project: FlowProject,
    writes: dict[Service, tuple[str, str]],
    browser: WatchedBrowser,
    foreign_pages: int,
    host: str,
) -> None:
    """Not even one of another port of the same name, to which the browser sends the cookie."""
    layout = project.stack.layout()
    create, body = writes["prefect"]
    mlflow = layout.url("mlflow") + writes["mlflow"][0]
    page = browser.new_page()
    answers: dict[str, set[int]] = {}
    page.on("response", lambda found: answers.setdefault(found.url, set()).add(found.status))
    page.goto(f"http://{host}:{foreign_pages}/")
    tried = page.evaluate(ATTACK, [layout.url("prefect"), mlflow, create, body])
    page.close()
    blind = (" text", " bytes", " beacon")  # sent without asking; the answer cannot be read
    opaque = {name: tried.pop(name) for name in list(tried) if name.endswith(blind)}
    assert set(opaque.values()) <= {"opaque", "sent", "refused"}, "the page read an answer"
    assert set(tried.values()) == {"refused"}, tried
    there = {url: found for url, found in answers.items() if not url.endswith(f"{foreign_pages}/")}
    assert there, "nothing was sent"
    assert set.union(*there.values()) <= set(REFUSALS), there


@pytest.mark.skipif(find_chromium() is None, reason=NOT_INSTALLED)
def test_a_name_that_was_made_to_lead_here_opens_nothing(
    project: FlowProject, browser: WatchedBrowser
) -> None:
    """Then a foreign page would be of the server's own origin, as far as the browser knows."""
    layout, page = project.stack.layout(), browser.new_page()
    for server in SERVERS:
        answer = page.goto(f"http://rebound.example:{layout.port(server)}/")
        assert answer is not None
        assert answer.status == 403
    page.close()


@pytest.mark.skipif(find_chromium() is None, reason=NOT_INSTALLED)
def test_the_printed_link_opens_both_servers_with_one_click(
    project: FlowProject,
    browser: WatchedBrowser,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It leaves no secret in the address; a link from another site works too, once signed in."""
    from flows.cli.servers import status_command

    layout = project.stack.layout()
    monkeypatch.chdir(project.root)
    status_command()
    links = [word for word in capsys.readouterr().out.split() if f"{TOKEN}=" in word]
    assert [link.partition("/?")[0] for link in links] == [layout.url(name) for name in SERVERS]
    stranger = browser.stranger()
    page = stranger.new_page()
    before = page.goto(layout.ui_url)
    assert before is not None
    assert before.status == 401
    stranger.keep(page, "not-signed-in")
    page.goto(links[0])
    page.get_by_text("Dashboard").first.wait_for()
    assert layout.secret not in page.url
    page.goto(f"{layout.url('mlflow')}/#/experiments?workflowType=machine_learning")
    page.get_by_text("qwen3-finetune").first.wait_for()
    page.goto("about:blank")
    page.set_content(f'<a href="{layout.ui_url}/deployments">a notice</a>')
    page.get_by_text("a notice").click()
    page.get_by_text("qwen3-finetune").first.wait_for()
    stranger.keep(page, "signed-in-by-a-notice")


# --- without knowing any of this ---


def test_mlflow_answers_its_client_only_with_the_secret(
    project: FlowProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qwen3ft env` prints the variables."""
    assert MlflowClient(project.tracking_uri).search_experiments()
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    with pytest.raises(MlflowException, match="qwen3ft env"):
        MlflowClient(project.tracking_uri).search_experiments()


class TestRuns:
    """Runs that are started on purpose."""

    @pytest.fixture(autouse=True)
    def nothing_happened(self) -> None:
        """Something does."""

    def prefect(self, project: FlowProject, *arguments: str) -> str:
        """Run `prefect` as typed in the project folder, in a shell that knows nothing."""
        shell = {"PATH": "/usr/bin:/bin", "HOME": str(project.root), "DO_NOT_TRACK": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=project.root,
            env={**shell, "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def test_a_run_typed_by_hand_goes_through_and_all_it_writes_is_private(
        self, project: FlowProject, deployment: dict[str, Any]
    ) -> None:
        """The secret is in the two files that hold it, and in nothing that a run or a server wrote.

        Prefect's and MLflow's databases, logs and artifacts are among what is looked at.
        """
        unless_new = ("--param", f"config={json.dumps({'when_unchanged': 'skip'})}")
        said = self.prefect(project, "deployment", "run", DEPLOYMENT, *unless_new, "--watch")
        assert any(state in said for state in COMPLETED_STATES)
        secret, root = project.stack.layout().secret, project.root
        written = [
            path
            for name in (".qwen3ft", "mlruns", "runs", "out", "prefect.toml")
            for path in (root / name, *(root / name).rglob("*"))
            if not path.is_symlink()
        ]
        assert len(written) > 100
        assert {path for path in written if path.stat().st_mode & 0o077} == set()
        holders = {
            path for path in written if path.is_file() and secret.encode() in path.read_bytes()
        }
        assert holders == {root / ".qwen3ft" / "secret", root / "prefect.toml"}

    def test_the_worker_refuses_what_the_server_let_through(
        self, project: FlowProject, deployment: dict[str, Any], marker: Path
    ) -> None:
        """Prefect's server does not check every request that can set them."""
        layout = project.stack.layout()
        changed = {"job_variables": {"command": f"touch '{marker}'"}}
        address = f"deployments/{deployment['id']}"
        send(layout, address, changed, "PATCH")
        try:
            asked = {
                "flow_id": deployment["flow_id"],
                "deployment_id": deployment["id"],
                "work_pool_name": services.POOL,
                "state": {"type": "SCHEDULED"},
                **changed,
            }
            run = send(layout, "flow_runs/", asked)["id"]
            ended = _wait_for_end(partial(send, layout, f"flow_runs/{run}", method="GET"))
        finally:
            send(layout, address, {"job_variables": {}}, "PATCH")
        assert ended["state_type"] == "CRASHED"
        assert "job variables: command" in ended["state"]["message"]
        assert not marker.exists()


def _wait_for_end(read: Any) -> dict[str, Any]:
    end = time.monotonic() + 120
    while (run := read())["state_type"] in ("SCHEDULED", "PENDING", "RUNNING"):
        assert time.monotonic() < end, f"the run is still {run['state_type']}"
        time.sleep(0.3)
    found: dict[str, Any] = run
    return found
