"""The stack's Prefect server accepts every request while others write; none gets a 503."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.server.api import deployments as deployments_api
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from deployments import services
from deployments.prefect_server import ImmediateSqlite, suggest_settings
from deployments.processes import free_port
from deployments.secret import authorization, make_secret
from deployments.services import Layout
from flows.finetune import qwen3_finetune

CLICKS, THREADS = 120, 6
START_SECONDS = 180.0


def read_then_write_while_another_writes(config: AioSqliteConfiguration) -> int:
    """Run two transactions at once, the first of which reads before it writes; count their rows."""

    async def run() -> int:
        engine = await config.engine()
        async with await config.session(engine) as session:
            await session.execute(text("create table rows (number integer)"))
            await session.commit()

        async def write() -> None:
            async with (
                await config.session(engine) as session,
                config.begin_transaction(session),
            ):
                await session.execute(text("insert into rows values (2)"))

        async with await config.session(engine) as session:
            async with config.begin_transaction(session):
                await session.execute(text("select count(*) from rows"))
                other = asyncio.create_task(write())
                await asyncio.wait({other}, timeout=0.3)
                await session.execute(text("insert into rows values (1)"))
            await other
            return int((await session.execute(text("select count(*) from rows"))).scalar_one())

    return asyncio.run(run())


def test_a_transaction_that_reads_first_can_write_while_another_waits(tmp_path: Path) -> None:
    """The second begins when the first is committed; neither fails."""
    config = ImmediateSqlite(f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}")
    assert read_then_write_while_another_writes(config) == 2


def test_prefects_own_transactions_still_fail_there(tmp_path: Path) -> None:
    """Once this fails, Prefect waits by itself and `deployments.prefect_server` can go."""
    config = AioSqliteConfiguration(f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}")
    with pytest.raises(OperationalError, match="database is locked"):
        read_then_write_while_another_writes(config)


# --- a real server under load ---


@contextmanager
def server(root: Path, module: str) -> Iterator[tuple[str, str]]:
    """Start a Prefect server by `module`; yield the address of its API, and its secret."""
    layout = Layout(root, free_port(4600), 0)
    layout.prefect_home.mkdir(parents=True)
    make_secret(root)
    command = services.command("prefect", layout, sys.executable)
    if module == "prefect":
        start = f"server start --host 127.0.0.1 --port {layout.prefect_port}"
        command[2:] = ["prefect", *start.split()]
    api = f"{layout.url('prefect')}/api"
    with (root / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=services.environment(layout), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + START_SECONDS
            while services.request_json(layout.secret, f"{api}/health") is not True:
                assert process.poll() is None, (root / "server.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.2)
            yield api, layout.secret
        finally:
            process.terminate()
            process.wait()


class Load:
    """Load on a server while people click: states, logs and events of runs.

    Every request has a connection of its own, because the server closes one after a 503. None is
    sent twice.
    """

    def __init__(self, api: str, secret: str) -> None:
        self.api, self.flow_id = api, ""
        self.headers = {"Authorization": authorization(secret)}
        self.ended = threading.Event()

    def post(self, path: str, body: Any) -> httpx.Response:
        """Send one request, once."""
        url = f"{self.api}/{path}"
        return httpx.post(url, json=body, headers=self.headers, timeout=120, trust_env=False)

    def insist(self, path: str, body: Any) -> Any:
        """Repeat a request until it succeeds, as Prefect's clients do."""
        for _ in range(50):
            if (answer := self.post(path, body)).is_success:
                return answer.json()
            time.sleep(0.2)
        raise AssertionError(answer.text)

    def deployment(self) -> str:
        """Make a deployment to click on, with a queue; return its id."""
        self.flow_id = self.insist("flows/", {"name": "clicked"})["id"]
        self.insist("work_pools/", {"name": "pool", "type": "process"})
        body = {"name": "d", "flow_id": self.flow_id, "work_pool_name": "pool"}
        return str(self.insist("deployments/", body)["id"])

    def runs(self) -> None:
        """Begin and end runs."""
        while not self.ended.wait(0.03):
            made = self.post("flow_runs/", {"flow_id": self.flow_id, "state": {"type": "PENDING"}})
            if not made.is_success:
                continue
            run = made.json()["id"]
            for state in ("RUNNING", "COMPLETED"):
                self.post(f"flow_runs/{run}/set_state", {"state": {"type": state}})
            key = {"task_key": "task", "dynamic_key": run}
            self.post("task_runs/", {"flow_run_id": run, **key, "state": {"type": "PENDING"}})
            line = {"name": "a", "level": 20, "message": "b", "flow_run_id": run}
            self.post("logs/", [line | {"timestamp": datetime.now(UTC).isoformat()}])

    def events(self) -> None:
        """Emit events."""
        while not self.ended.wait(0.03):
            event = {"event": "a.b", "resource": {"prefect.resource.id": "c"}, "payload": {}}
            now = datetime.now(UTC).isoformat()
            self.post("events", [event | {"id": str(uuid.uuid4()), "occurred": now}])


def click_under_load(api: str, secret: str) -> Counter[int]:
    """Start runs of a deployment from several threads under load; count the status codes."""
    load = Load(api, secret)
    deployment = load.deployment()
    work: tuple[Callable[[], None], ...] = (load.runs, load.runs, load.events)
    background = [threading.Thread(target=target) for target in work]
    for thread in background:
        thread.start()

    def click(_: int) -> int:
        return load.post(f"deployments/{deployment}/create_flow_run", {}).status_code

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return Counter(pool.map(click, range(CLICKS)))
    finally:
        load.ended.set()
        for thread in background:
            thread.join()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("module", ["prefect", "deployments.prefect_server"])
def test_no_click_is_lost_on_a_busy_server(tmp_path: Path, module: str) -> None:
    """Prefect's own server refuses nearly all of them, the stack's server none."""
    with server(tmp_path, module) as (api, secret):
        answers = click_under_load(api, secret)
    print(f"\n{module}: {answers[503]} of {CLICKS} answered 503")  # noqa: T201
    if module == "prefect":
        assert answers[503] > 0, "the load is too small to show anything"
    else:
        assert answers == {201: CLICKS}


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"config": {"lorar": 3}}, "did you mean lora_r?"),
        ({"config": {"lorar": 3}}, "--param 'config={\"lora_r\": ...}'"),
        ({"config": {"columns": {"questoin": "q"}}}, "did you mean question?"),
        ({"num_epochs": 2}, "--param 'config={\"num_epochs\": ...}'"),
    ],
)
def test_the_refusal_of_an_unknown_parameter_says_which_setting_was_meant(
    parameters: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts a run: the form, the command line, the API."""
    schema = parameter_schema(qwen3_finetune).model_dump_for_openapi() | {
        "additionalProperties": False
    }
    monkeypatch.setattr(deployments_api, "validate", deployments_api.validate)
    suggest_settings()
    with pytest.raises(ValidationError) as caught:
        deployments_api.validate(parameters, schema, raise_on_error=True)
    assert words in str(caught.value)
    other = {"type": "object", "properties": {"x": {}}, "additionalProperties": False}
    with pytest.raises(ValidationError) as caught:  # of a deployment of the user's own
        deployments_api.validate({"y": 1}, other, raise_on_error=True)
    assert "config" not in str(caught.value)
    deployments_api.validate({"config": {"num_epochs": 2}}, schema, raise_on_error=True)
    with pytest.raises(ValidationError) as caught:
        deployments_api.validate({"config": {"lora_r": 0}}, schema, raise_on_error=True)
    assert "did you mean" not in str(caught.value)
