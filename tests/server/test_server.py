"""The server as OpenAI's clients meet it: answers, streams, limits, refusals and access."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.planted_adapters import EMOJI, plant
from support.served import (
    ENGINES,
    QUEUE,
    SLOTS,
    Running,
    engines_in_threads,
    keep_test_answers,
    running,
)
from support.trained_adapter import Trained
from support.vllm_program import place_vllm

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import (
    DataLoadingError,
    EnvironmentNotReadyError,
    FinetuneError,
    OutOfMemoryError,
    PreemptedError,
    ServedOtherwiseError,
    WorkerCrashedError,
)
from qwen3ft.evaluation.answers import choose_questions
from qwen3ft.evaluation.exam import to_question
from qwen3ft.records.serving import EngineName, ServeRequest
from qwen3ft.registry.registry import Registry
from qwen3ft.server import answers as server_answers
from qwen3ft.server import choice, front
from qwen3ft.server import engines as server_engines
from qwen3ft.server.access import Access, is_loopback, make_key
from qwen3ft.server.choice import EngineMaker
from qwen3ft.server.engines import Engine
from qwen3ft.server.manager import Manager
from qwen3ft.server.probe import read_kept_test
from qwen3ft.server.served import Served
from qwen3ft.server.sources import Source, find_source
from qwen3ft.serving.engines import vllm
from qwen3ft.serving.stops import StopFilter

NO_REGISTRY = Registry("sqlite:////nowhere/mlflow.db")
MANY_TOKENS = 900
"""Length of an answer that is still being written when the next things happen."""


@pytest.fixture(scope="module")
def answers(trained: Trained) -> list[str]:
    return keep_test_answers(trained, trained.saved)


@pytest.fixture(scope="module")
def source(trained: Trained) -> Source:
    return find_source(trained.config, NO_REGISTRY, str(trained.adapter))


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        engines_in_threads(patch)
        yield


@pytest.fixture(scope="module", params=ENGINES)
def server(
    _threads: None,
    trained: Trained,
    answers: list[str],
    source: Source,
    request: pytest.FixtureRequest,
) -> Iterator[Running]:
    with running(trained.config, source, NO_REGISTRY, engine=request.param) as made:
        yield made


def content(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --- answers ---


def test_a_plain_request_gives_the_tested_answer(
    server: Running, trained: Trained, answers: list[str]
) -> None:
    """All rows, asked together; each response names the version and counts its tokens."""
    questions = [row["question"] for row in trained.rows]
    with ThreadPoolExecutor(SLOTS) as pool:
        responses = list(pool.map(server.ask, questions))
    assert [content(response) for response in responses] == answers
    body = responses[0].json()
    assert body["model"] == server.announcement.model
    assert body["choices"][0]["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 2


def test_a_stream_adds_up_to_the_answer(
    server: Running, trained: Trained, answers: list[str]
) -> None:
    """The role comes first, the reason of the end last, the token counts if they are asked for."""
    longest = max(range(len(answers)), key=lambda index: len(answers[index]))
    question = trained.rows[longest]["question"]
    first, *middle, end = server.stream(question)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [event["choices"][0]["delta"] for event in middle]
    assert "".join(delta["content"] for delta in deltas) == answers[longest]
    assert len(deltas) > 1
    assert end["choices"][0]["finish_reason"] == "stop"
    *_, counted = server.stream(question, stream_options={"include_usage": True})
    assert counted["usage"] == server.ask(question).json()["usage"]


def test_limits_and_stops_end_an_answer(
    server: Running, trained: Trained, answers: list[str]
) -> None:
    """`max_tokens` ends it with "length"; a stop text is cut off with what follows."""
    longest = max(range(len(answers)), key=lambda index: len(answers[index]))
    question, answer = trained.rows[longest]["question"], answers[longest]
    short = server.ask(question, max_tokens=1)
    assert short.json()["choices"][0]["finish_reason"] == "length"
    assert short.json()["usage"]["completion_tokens"] == 1
    assert answer.startswith(content(short))
    stop = answer[len(answer) // 2 :][:2]
    stopped = server.ask(question, stop=stop)
    assert content(stopped) == answer[: answer.index(stop)]
    assert stopped.json()["choices"][0]["finish_reason"] == "stop"
    events = server.stream(question, stop=[stop, "never"])
    parts = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(parts) == answer[: answer.index(stop)]


def test_draws_depend_on_seed_temperature_and_top_p(server: Running) -> None:
    """The same seed draws the same; a nucleus of one token is greedy decoding."""
    question = "Tell me something that is not in your data, please."
    drawn = [content(server.ask(question, temperature=2.0, seed=seed)) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    greedy = content(server.ask(question))
    for least in ({"top_p": 1e-9}, {"top_p": 1e-60}, {"temperature": 1e-40}):
        assert content(server.ask(question, **{"temperature": 2.0, "seed": 7, **least})) == greedy
    assert content(server.ask(question, temperature=0.01, seed=8)) == greedy


def test_a_system_prompt_parts_and_earlier_turns_are_rendered(server: Running) -> None:
    """More of a conversation is a longer prompt; parts of a text are one text."""
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two", "reasoning_content": None},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Thr"}, {"type": "text", "text": "ee"}],
        },
    ]
    counts = [
        server.post({"messages": messages}).json()["usage"]["prompt_tokens"]
        for messages in (turns[3:], turns[1:], turns)
    ]
    assert counts == sorted(set(counts))
    plain = server.ask("Three").json()["usage"]["prompt_tokens"]
    assert counts[0] == plain


def test_plain_completions_continue_a_text(server: Running) -> None:
    response = server.client.post("/v1/completions", json={"prompt": "Which", "max_tokens": 4})
    assert response.json()["object"] == "text_completion"
    assert response.json()["usage"]["completion_tokens"] <= 4
    assert isinstance(response.json()["choices"][0]["text"], str)


# --- refusals ---


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"wings": 2}, "wings"),
        ({"chat_template_kwargs": {"wings": 2}}, "chat_template_kwargs.wings"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["x"] * 99}, "stop"),
        ({"stop": ["x", ""]}, "stop.1"),
        ({"n": True}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"model": "another"}, "model"),
    ],
)
def test_a_parameter_that_cannot_be_met_is_refused_by_name(
    server: Running, parameters: dict[str, Any], param: str
) -> None:
    error = error_of(server.ask("Hello", **parameters), 404 if param == "model" else 400)
    assert error["param"] == param
    assert param.rpartition(".")[2] in error["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "assistant", "content": "Hello"}],
        [{"role": "tool", "content": "5"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": "Hello", "reasoning_content": "Hm."}],
        "Hello",
    ],
)
def test_messages_that_cannot_be_rendered_are_refused(server: Running, messages: Any) -> None:
    assert "messages" in error_of(server.post({"messages": messages}), 400)["param"]


def test_what_has_no_effect_is_named(server: Running) -> None:
    """Neutral values of unsupported parameters pass; the rest is listed in a header."""
    response = server.ask("Hello", user="me", n=1, tools=[], metadata={"a": "b"}, seed=None)
    assert response.headers["x-qwen3ft-ignored"] == "user, metadata"
    assert "x-qwen3ft-ignored" not in server.ask("Hello").headers


def test_a_text_that_is_none_is_refused(server: Running) -> None:
    """Half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    body = '{"messages": [{"role": "user", "content": "\\ud800"}]}'
    json_type = {"Content-Type": "application/json"}
    refused = server.client.post("/v1/chat/completions", content=body, headers=json_type)
    assert (refused.status_code, refused.json()["error"]["message"]) == (
        400,
        "The body is not JSON.",
    )


def test_a_text_continued_has_no_logprobs_either(server: Running) -> None:
    """There 0 asks for those of the tokens that were chosen."""
    body = {"prompt": "Which", "logprobs": 0}
    assert error_of(server.client.post("/v1/completions", json=body), 400)["param"] == "logprobs"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ('"max_tokens": 1, "max_tokens": 2', "max_tokens"),
        ('"chat_template_kwargs": {"enable_thinking": true, "enable_thinking": false}', None),
        ('"metadata": {"share": NaN}', None),
        ('"metadata": [-Infinity]', None),
    ],
)
def test_no_value_is_dropped_while_a_body_is_read(
    server: Running, more: str, param: str | None
) -> None:
    """A name that comes twice, and what JSON does not have."""
    body = f'{{"messages": [{{"role": "user", "content": "Hello"}}], {more}}}'
    json_type = {"Content-Type": "Application/JSON; charset=utf-8"}
    refused = server.client.post("/v1/chat/completions", content=body, headers=json_type)
    error = error_of(refused, 400)
    assert error["param"] == (param or ("enable_thinking" if "kwargs" in more else None))
    assert ("more than once" in error["message"]) == (error["param"] is not None)


def test_a_body_that_does_not_arrive_is_not_waited_for(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends one byte of a hundred gets an answer all the same."""
    monkeypatch.setattr(front, "BODY_SECONDS", 0.2)
    host, port = server.client.base_url.host, server.client.base_url.port
    head = ("POST /v1/chat/completions HTTP/1.1", f"Host: {host}:{port}")
    kind = ("Content-Type: application/json", "Content-Length: 100")
    with socket.create_connection((host, port), timeout=20) as client:
        client.sendall("\r\n".join((*head, *kind, "", "{")).encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_long_prompts_are_refused_with_the_limit(server: Running) -> None:
    """By tokens, by tokens with the answer, and by bytes before anything is parsed."""
    for words, parameters in ((3000, {}), (10, {"max_tokens": 1020})):
        error = error_of(server.ask("word " * words, **parameters), 400)
        assert error["code"] == "context_length_exceeded"
        assert "1,024 tokens" in error["message"]
    error = error_of(server.ask("x" * 100_000), 413)
    assert "65,536 bytes" in error["message"]


def test_bodies_and_routes_that_are_none(server: Running) -> None:
    json_type = {"Content-Type": "application/json"}
    for body in (b"{", b"[]", b"\xff", b"[" * 50_000):
        error_of(server.client.post("/v1/chat/completions", content=body, headers=json_type), 400)
    plain = {"Content-Type": "text/plain"}
    error_of(server.client.post("/v1/chat/completions", content=b"{}", headers=plain), 415)
    error_of(server.client.get("/v1/nothing"), 404)
    elsewhere = server.client.post("/v1/chat/completions/", headers={"Host": "elsewhere.example"})
    error_of(elsewhere, 404)  # no redirection to that host
    refused = server.client.get("/v1/chat/completions")
    error_of(refused, 405)
    assert refused.headers["allow"] == "POST"


# --- the queue ---


def in_progress(server: Running) -> int:
    text = server.client.get("/metrics").text
    [line] = [one for one in text.splitlines() if one.startswith("qwen3ft_requests_in_progress ")]
    return int(float(line.split()[1]))


def wait_until_idle(server: Running) -> None:
    deadline = time.monotonic() + 20
    while in_progress(server):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_queue_says_when_to_come_back_and_a_client_that_leaves_frees_its_slot(
    trained: Trained, tmp_path: Path, engine: EngineName
) -> None:
    """All slots and places are taken by endless answers; their clients leave, and all is free."""
    endless = find_source(trained.config, NO_REGISTRY, plant(trained, "endless", tmp_path).path)
    with running(trained.config, endless, NO_REGISTRY, engine=engine, probe_rows=0) as server:
        fill_and_leave(server, trained.rows[0]["question"])
        wait_until_idle(server)
        assert server.ask("Hello", max_tokens=1).status_code == 200
        assert 'status="499"' in server.client.get("/metrics").text


def fill_and_leave(server: Running, question: str) -> None:
    """Ask until a request is refused; then leave without waiting for the answers."""

    async def campaign() -> None:
        limits = httpx.Limits(max_connections=None)
        address = str(server.client.base_url)
        messages = [{"role": "user", "content": question}]
        body = {"messages": messages, "stream": True, "max_tokens": MANY_TOKENS}
        async with httpx.AsyncClient(base_url=address, limits=limits, trust_env=False) as client:
            tasks = [
                asyncio.create_task(client.post("/v1/chat/completions", json=body))
                for _ in range(SLOTS + QUEUE)
            ]
            while in_progress(server) < SLOTS + QUEUE:
                await asyncio.sleep(0.005)
                assert not any(task.done() for task in tasks)
            refused = await client.post("/v1/chat/completions", json=body)
            assert error_of(refused, 429)["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) >= 1
            # refused unread: the body would be too long, and is no JSON either
            unread = await client.post("/v1/chat/completions", content=b"x" * 100_000)
            assert error_of(unread, 429)["code"] == "queue_full"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(campaign())


def test_a_client_that_reads_nothing_does_not_keep_its_version(
    trained: Trained, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is sent blocks for ever; it is left, and the version may go."""
    monkeypatch.setattr(server_answers, "TAKE_SECONDS", 0.1)
    served = front.Front(Served("model"), QUEUE)
    served.access = Access("127.0.0.1", 1, "")
    request = ServeRequest(
        engine="own",
        config=trained.config,
        adapter=str(trained.adapter),
        device="cpu",
        socket="",
        slots=SLOTS,
    )
    manager = Manager(served, trained.config, lambda _: Engine(request), probe_rows=0)
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    left = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not left.is_set():
            left.set()
            return {"type": "http.request", "body": json.dumps(body).encode()}
        return await asyncio.Future()

    async def send(_: Any) -> None:
        await asyncio.Future()

    async def check() -> None:
        version = await manager.use(source, cast(Any, None))
        headers = [(b"host", b"127.0.0.1:1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
        request = served.app({**scope, "headers": headers}, receive, send)
        await asyncio.wait_for(request, 30)
        assert (version.answering, served.in_progress) == (0, 0)
        await manager.close()

    asyncio.run(check())
    assert b'status="499"' in served.metrics.text()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_characters_of_several_tokens_arrive_whole(
    trained: Trained, tmp_path: Path, engine: EngineName
) -> None:
    """Streamed or not, from every engine."""
    emoji = find_source(trained.config, NO_REGISTRY, plant(trained, "emoji", tmp_path).path)
    question = trained.rows[0]["question"]
    with running(trained.config, emoji, NO_REGISTRY, engine=engine, probe_rows=0) as server:
        events = server.stream(question)
        texts = [event["choices"][0]["delta"].get("content", "") for event in events]
        text = "".join(texts)
        # it has learnt that such a character comes here; the very one takes more steps
        assert (len(text), ord(text[0]) > 0xFFFF) == (len(EMOJI), True)
        answer = server.ask(question).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == (text, "stop")


# --- access and routes ---


def test_models_health_and_metrics(server: Running) -> None:
    """The registered model stands for the version in use, under whose name it answers."""
    listed = server.client.get("/v1/models").json()["data"]
    name = server.announcement.model
    registered = name.removesuffix("-night-1")
    assert [model["id"] for model in listed] == [registered, name]
    assert listed[0]["root"] == name
    for model in ("champion", registered, name):
        assert server.ask("Hello", model=model).json()["model"] == name
    assert server.client.get("/health").json() == {"status": "ready", "model": name}
    text = server.client.get("/metrics").text
    assert f'qwen3ft_version_in_use{{version="{name}"}} 1.0' in text
    assert f'qwen3ft_tokens_total{{kind="completion",version="{name}"}}' in text


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "rebound.example:80"}, "foreign_host"),
        ({"Origin": "http://page.example"}, "foreign_origin"),
        ({"Origin": "null"}, "foreign_origin"),
    ],
)
def test_web_pages_do_not_get_in(server: Running, headers: dict[str, str], code: str) -> None:
    for path in ("/v1/models", "/metrics", "/health"):
        assert error_of(server.client.get(path, headers=headers), 403)["code"] == code
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    response = server.client.post("/v1/chat/completions", json=body, headers=headers)
    assert error_of(response, 403)["code"] == code


def test_beyond_loopback_a_key_is_needed(
    trained: Trained, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made by itself, for its owner alone, and shown once."""
    monkeypatch.chdir(tmp_path)
    with running(trained.config, source, NO_REGISTRY, host="0.0.0.0", probe_rows=2) as made:
        key = made.announcement.made_key
        path = made.announcement.key_file
        assert key is not None
        assert path is not None
        assert path.read_text() == key
        assert path.stat().st_mode & 0o777 == 0o600
        for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": key}):
            response = made.client.get("/v1/models", headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
        good = {"Authorization": f"Bearer {key}"}
        assert made.client.get("/v1/models", headers=good).status_code == 200
        assert made.client.get("/health").status_code == 200
    assert make_key(path) == (key, False)
    path.write_text("\n")  # an empty key would let everybody in
    assert make_key(path)[1]
    assert make_key(path)[0].startswith("sk-")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, True) for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")),
    ],
)
def test_which_addresses_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# --- before it is ready ---


def copied_test(trained: Trained, folder: Path) -> tuple[TrainingConfig, Path]:
    """Return settings with a copy of the runs, and the file of the answers there."""
    runs = Path(shutil.copytree(trained.config.runs_dir, folder / "runs"))
    path = runs / "night-1" / "jobs/inference/answers.jsonl"
    request = json.loads((path.parent / "plan.json").read_text())
    (path.parent / "plan.json").write_text(json.dumps({**request, "answers_path": str(path)}))
    return trained.config.model_copy(update={"runs_dir": str(runs)}), path


def test_what_answers_otherwise_than_in_its_test_is_not_served(
    trained: Trained, answers: list[str], source: Source, tmp_path: Path
) -> None:
    """The error names the questions that differ; nothing is announced."""
    config, path = copied_test(trained, tmp_path)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    kept[3]["candidate"] = "Something else."
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    with (
        pytest.raises(ServedOtherwiseError, match=r"15 of 16 answers are the same") as raised,
        running(config, source, NO_REGISTRY),
    ):
        pass
    assert kept[3]["question"][-80:] in raised.value.what
    [other] = raised.value.facts["differing"]
    assert (other["tested"], other["served"]) == ("Something else.", answers[3])


def test_a_test_that_stopped_early_is_compared_by_what_it_asked(
    trained: Trained, answers: list[str], tmp_path: Path
) -> None:
    config, path = copied_test(trained, tmp_path)
    kept = path.read_text().splitlines(keepends=True)
    asked = choose_questions([to_question(row) for row in trained.rows], len(kept) // 2)
    path.write_text("".join(kept[index] for index in asked))
    found = read_kept_test(config, "night-1", 100).answers
    assert len(found) == len(kept) // 2
    for one, index in zip(found, asked, strict=True):
        assert one.messages[-1]["content"] == trained.rows[index]["question"]
        assert one.answer == answers[index]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.partition("\n")[2],  # so the others are not those to the same questions
        lambda text: text.replace('{"question', "{question", 1),
        lambda text: text.replace('{"question"', '{"wings": 2, "question"', 1),
        lambda text: "\ud800".join(text.partition("}")[::2]),
    ],
    ids=["one is missing", "no JSON", "another version", "no text"],
)
def test_unreadable_answers_are_none(
    trained: Trained, answers: list[str], tmp_path: Path, damage: Callable[[str], str]
) -> None:
    """The error is one that following a champion survives."""
    config, path = copied_test(trained, tmp_path)
    path.write_bytes(damage(path.read_text()).encode(errors="surrogatepass"))
    with pytest.raises(DataLoadingError, match="no kept answers"):
        read_kept_test(config, "night-1", 100)


def test_an_engine_that_nobody_named_and_does_not_start_gives_way_to_the_product_s_own(
    trained: Trained,
    answers: list[str],
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The output says why; one that is named ends the server with its error."""
    monkeypatch.setattr(choice, "choose_engine", lambda *_: ("vllm", "as on a GPU that it fits"))
    program = place_vllm(tmp_path, "0.32.0")
    program.write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    monkeypatch.setattr(vllm, "find_vllm", lambda: str(program))
    monkeypatch.setattr("gc.collect", lambda: 0)  # it takes long in the process of the tests
    said = list[str]()
    request = ServeRequest(
        engine="own",
        config=trained.config.model_copy(update={"max_memory_gb": 8.0}),
        adapter="",
        device="cpu",
        socket="",
        slots=SLOTS,
    )
    maker = EngineMaker("auto", request, said.append)
    options = {"maker": maker, "fall_back": maker.fall_back}
    with running(trained.config, source, NO_REGISTRY, **options) as made:
        assert content(made.ask(trained.rows[0]["question"])) == answers[0]
    assert said[0] == "Engine: vllm, as on a GPU that it fits."
    assert said[1].startswith("vllm is not used: vLLM ended with status 3.")
    assert said[2:] == ["Engine: own, which tested the adapter."]
    named = EngineMaker("vllm", request, said.append)
    named(source.folder)
    assert not named.fall_back(WorkerCrashedError("x", why="y", next_command="qwen3ft serve"))


@pytest.mark.slow  # two engines: 2 s
def test_an_engine_that_answers_otherwise_than_tested_gives_way(
    trained: Trained, answers: list[str], source: Source, tmp_path: Path
) -> None:
    """It has ended before the next one is made."""
    config, path = copied_test(trained, tmp_path)
    tested = path.read_text()
    path.write_text(tested.replace('"candidate":"', '"candidate":"Not '))
    engines = list[Engine]()

    def make(folder: Path) -> Engine:
        assert not any(engine._job.path.exists() for engine in engines)
        request = ServeRequest(
            engine="own", config=config, adapter=str(folder), device="cpu", socket="", slots=2
        )
        engines.append(Engine(request))
        return engines[-1]

    def fall_back(error: FinetuneError) -> bool:
        path.write_text(tested)
        return isinstance(error, ServedOtherwiseError)

    with running(config, source, NO_REGISTRY, maker=make, fall_back=fall_back) as made:
        assert content(made.ask(trained.rows[0]["question"])) == answers[0]
    assert len(engines) == 2


def noting(asked: list[FinetuneError]) -> Callable[[FinetuneError], bool]:
    """Return a function that adds the error to `asked`, and makes no other engine."""

    def fall_back(error: FinetuneError) -> bool:
        asked.append(error)
        return False

    return fall_back


def test_without_kept_answers_nothing_is_claimed(
    trained: Trained, source: Source, tmp_path: Path
) -> None:
    """No engine could be proven, so no other one is made."""
    config = trained.config.model_copy(update={"runs_dir": str(tmp_path)})
    asked = list[FinetuneError]()
    with (
        pytest.raises(DataLoadingError, match="no kept answers"),
        running(config, source, NO_REGISTRY, fall_back=noting(asked)),
    ):
        pass
    assert not asked


def test_a_server_that_is_stopped_while_it_starts_makes_no_other_engine(
    trained: Trained, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where systemd asks all its processes to end, the worker among them."""
    stopped = PreemptedError("The worker was asked to stop (SIGTERM).")

    def end(*_: Any, **__: Any) -> None:
        raise stopped

    monkeypatch.setattr(server_engines, "run_worker", end)
    asked = list[FinetuneError]()
    with (
        pytest.raises(PreemptedError),
        running(trained.config, source, NO_REGISTRY, fall_back=noting(asked)),
    ):
        pass
    assert not asked


def test_an_engine_whose_memory_runs_out_as_it_starts_gives_way(
    trained: Trained, answers: list[str], source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the worker may that writes the 16-bit weights; it is closed before the next one."""
    full = OutOfMemoryError("Memory ran out before the base was written.")
    made, asked, work = list[Engine](), list[FinetuneError](), server_engines.run_worker

    def end_the_first(*arguments: Any, **options: Any) -> Any:
        if len(made) == 1:
            raise full
        return work(*arguments, **options)

    def make(folder: Path) -> Engine:
        assert not any(engine._job.path.exists() for engine in made)
        request = ServeRequest(
            engine="own",
            config=trained.config,
            adapter=str(folder),
            device="cpu",
            socket="",
            slots=SLOTS,
        )
        made.append(Engine(request))
        return made[-1]

    def fall_back(error: FinetuneError) -> bool:
        asked.append(error)
        return True

    monkeypatch.setattr(server_engines, "run_worker", end_the_first)
    with running(trained.config, source, NO_REGISTRY, maker=make, fall_back=fall_back) as server:
        assert content(server.ask(trained.rows[0]["question"])) == answers[0]
    assert (asked, len(made)) == ([full], 2)


def test_a_port_in_use_is_named(server: Running, trained: Trained, source: Source) -> None:
    port = server.client.base_url.port
    with (
        pytest.raises(EnvironmentNotReadyError, match=f"port {port}"),
        running(trained.config, source, NO_REGISTRY, port=port),
    ):
        pass


def test_nothing_is_left_behind(trained: Trained, source: Source) -> None:
    """Neither threads nor files of the session."""
    before = threading.active_count()
    with running(trained.config, source, NO_REGISTRY, probe_rows=2):
        sessions = list((Path(trained.config.cache_dir) / "sessions").iterdir())
        assert sessions
    left = set((Path(trained.config.cache_dir) / "sessions").iterdir())
    assert left < set(sessions)
    assert threading.active_count() <= before


# --- stop texts ---


@given(
    st.text("ab<", max_size=30),
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_a_stop_text_is_found_wherever_the_pieces_end(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    """What passes is everything before the first stop text."""
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    stop_filter, passed = StopFilter(stops), ""
    for start, end in pairwise(borders):
        if not stop_filter.found:
            passed += stop_filter.feed(text[start:end])
    passed += stop_filter.close()
    whole = [text.find(stop) for stop in stops if stop in text]
    if stop_filter.found:
        # the stop that ends first decides, as each piece is looked at when it comes
        assert any(text[len(passed) :].startswith(stop) for stop in stops)
    else:
        assert passed == text
    assert stop_filter.found == bool(whole)
