"""Chat with a fine-tuned model that runs in a worker, within the memory budget.

When a `ChatSession` is left, however that happens, the worker is gone, and so are the files with
what was asked and answered.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen3ft.disk.files import append_json_line, lines_from
from qwen3ft.errors import FinetuneError, WorkerCrashedError
from qwen3ft.jobs.folders import JobDir
from qwen3ft.jobs.launcher import WATCH_SECONDS, run_worker
from qwen3ft.jobs.processes import GRACE_SECONDS
from qwen3ft.records.requests import AskRequest, ChatEnded, ChatQuestion, Chunk

TAIL_SECONDS = 0.02


class ChatSession:
    """A worker that answers questions until the session is left.

    Args:
        request: The adapter to load, and how to ask it.
    """

    def __init__(self, request: AskRequest) -> None:
        self._request = request
        self._offset = 0
        self._failure: list[Exception] = []

    def __enter__(self) -> Self:
        config = self._request.config
        parent = Path(config.cache_dir).resolve() / "sessions"
        parent.mkdir(parents=True, exist_ok=True)
        self._job = JobDir(Path(tempfile.mkdtemp(dir=parent))).create(self._request)
        self._thread = threading.Thread(target=self._run, name="ask", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._job.stop.touch()
        append_json_line(self._job.questions, ChatQuestion(end=True).model_dump(mode="json"))
        # A worker that is still loading sees neither; it ends when this process ends.
        self._thread.join(GRACE_SECONDS if kind is None else 2 * WATCH_SECONDS)
        shutil.rmtree(self._job.path, ignore_errors=True)

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            FinetuneError: the worker ended.
        """
        for chunk in self._chunks():
            if chunk.kind == "ready":
                return

    def ask(self, messages: Sequence[dict[str, Any]]) -> Iterator[Chunk]:
        """Ask for the assistant's next turn; yield it chunk by chunk, an 'end' last.

        Raises:
            FinetuneError: the worker ended.
        """
        question = ChatQuestion(messages=tuple(messages))
        append_json_line(self._job.questions, question.model_dump(mode="json"))
        for chunk in self._chunks():
            if chunk.kind == "ready":
                continue
            yield chunk
            if chunk.kind == "end":
                return

    def _chunks(self) -> Iterator[Chunk]:
        while True:
            ended = not self._thread.is_alive()  # asked before reading: its last lines still count
            offset = self._offset
            for line in lines_from(self._job.pieces, self._offset):
                self._offset = line.end_offset
                yield Chunk.model_validate_json(line.content)
            if ended and self._offset == offset:
                raise self._failure[0] if self._failure else _ended_early()
            time.sleep(TAIL_SECONDS)

    def _run(self) -> None:
        try:
            run_worker(
                "answer", self._job, ChatEnded, stall_seconds=self._request.config.stall_seconds
            )
        except (FinetuneError, OSError) as error:
            self._failure.append(error)


def _ended_early() -> WorkerCrashedError:
    return WorkerCrashedError(
        "The worker ended before the chat did.",
        why="It left neither an error nor a result.",
        next_command="qwen3ft doctor",
    )
