"""The worker's side of the server where another program computes: vLLM or llama.cpp.

It gets prompts as token ids and gives token ids back, so that an answer is made and ended as by the
product's own decoder (`qwen3ft.serving.engines.asking`), whatever the program does with texts. Its
base model is the 4-bit one of the test, with its weights written out
(`qwen3ft.serving.engines.base_weights`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing, nullcontext
from pathlib import Path
from typing import Any, Protocol

from qwen3ft.chat.tokenizer import load_tokenizer
from qwen3ft.decoding.writing import AnswerLimits, Marks
from qwen3ft.errors import FinetuneError
from qwen3ft.model.manager import with_end
from qwen3ft.model.saved_adapter import find_base, open_adapter, shape_of
from qwen3ft.records.base import Record
from qwen3ft.records.serving import (
    MOST_LINE_BYTES,
    AdapterLoaded,
    Ask,
    Cancel,
    Close,
    Ended,
    Load,
    Prompting,
    Ready,
    Refused,
    ServeEnded,
    ServeRequest,
    ToWorker,
    Unload,
    to_worker,
)
from qwen3ft.records.training import Failure
from qwen3ft.serving.engines.asking import Asker, PreparedQuestion
from qwen3ft.serving.engines.events import NotTakenError, engine_failed
from qwen3ft.serving.engines.llama_cpp import LlamaServers
from qwen3ft.serving.engines.places import choose_context, require_place
from qwen3ft.serving.engines.tally import Tally
from qwen3ft.serving.engines.vllm import VllmServer
from qwen3ft.serving.prompting import trained_prompting

_BEAT_SECONDS = 1.0


class InferenceServer(Protocol):
    """A program that continues texts with adapters of one base model."""

    slots: int
    """Most answers written at a time."""
    places: int
    """Most adapters loaded at a time."""
    rank: int
    """Largest rank of an adapter that it has room for."""

    async def start(self) -> None:
        """Load the base model, and wait until it answers."""

    async def watch(self) -> FinetuneError:
        """Return the reason once the program has ended by itself."""

    async def load(self, name: str, folder: Path) -> None:
        """Load an adapter."""

    async def unload(self, name: str) -> None:
        """Forget an adapter."""

    def continue_text(
        self, name: str, ids: Sequence[int], limits: AnswerLimits, most_tokens: int
    ) -> AsyncGenerator[list[int]]:
        """Yield new tokens as they are written, the end token included.

        Args:
            name: The adapter.
            ids: The text so far.
            limits: How tokens are chosen.
            most_tokens: Most new tokens.
        """

    async def close(self) -> None:
        """End the program."""


def relay_session(request: ServeRequest, scratch: Path, beat: Callable[[str], None]) -> ServeEnded:
    """Start the program, then relay questions and answers until the server ends the session.

    Raises:
        ModelNotFoundError, SaveError, ModelUnavailableError: as `find_base`.
        EnvironmentNotReadyError: the program, or memory for it, is missing.
        WorkerCrashedError: the program ended by itself, or failed to answer.
    """
    return asyncio.run(_Relay(request, scratch).run(beat))


class _Relay:
    def __init__(self, request: ServeRequest, scratch: Path) -> None:
        opened = open_adapter(Path(request.adapter))
        self._socket, self._base = request.socket, find_base(opened)
        shape = shape_of(Path(self._base))
        context_tokens = choose_context(request, trained_prompting(opened.provenance), shape)
        tokenizer = load_tokenizer(self._base)
        marks = Marks.of(tokenizer, _end_tokens(self._base, tokenizer.eos_token_id))
        self._asker = Asker(tokenizer, marks, context_tokens)
        extent = (marks.ends, context_tokens, scratch)
        self._server: InferenceServer = (
            VllmServer(request, Path(self._base), opened.spec.r, *extent)
            if request.engine == "vllm"
            else LlamaServers(request, Path(self._base), tokenizer, *extent)
        )
        # more would wait in the program, in the time that it has for its next token
        self._slots = asyncio.Semaphore(self._server.slots)
        self._prompting: dict[str, Prompting] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by the number of the answer
        self._others: set[asyncio.Task[None]] = set()
        self._answered = 0

    async def run(self, beat: Callable[[str], None]) -> ServeEnded:
        reader, self._link = await asyncio.open_unix_connection(self._socket, limit=MOST_LINE_BYTES)
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        works = [self._serve(), self._attend(reader), self._beat(beat)]
        running = [asyncio.create_task(work) for work in works]
        try:
            done, _ = await asyncio.wait(
                (*running, self._failed), return_when=asyncio.FIRST_COMPLETED
            )
            for each in done:
                await each  # raises what ended it
            return ServeEnded(answered=self._answered)
        finally:
            left = [*running, *self._tasks.values(), *self._others]
            for task in left:
                task.cancel()
            await asyncio.wait(left)
            await self._server.close()
            self._link.close()

    async def _serve(self) -> None:
        await self._server.start()
        server, context = self._server, self._asker.context_tokens
        self._send(Ready(slots=server.slots, context_tokens=context, places=server.places))
        raise await server.watch()

    async def _attend(self, reader: asyncio.StreamReader) -> None:
        """Do what the server asks for, until it ends the session or is gone."""
        while line := await reader.readline():
            message: ToWorker = to_worker.validate_json(line)
            if isinstance(message, Close):
                return
            if isinstance(message, Load):
                self._start(self._load(message))
            elif isinstance(message, Unload):
                self._prompting.pop(message.name)
                self._start(self._server.unload(message.name))
            elif isinstance(message, Cancel):
                if (task := self._tasks.pop(message.id, None)) is not None:
                    task.cancel()
            else:
                self._ask(message)

    async def _beat(self, beat: Callable[[str], None]) -> None:
        while True:
            beat("answer" if self._tasks else "wait")
            await asyncio.sleep(_BEAT_SECONDS)

    async def _load(self, message: Load) -> None:
        failure = None
        try:
            opened = await asyncio.to_thread(open_adapter, Path(message.folder))
            loaded, server = len(self._prompting), self._server
            require_place(opened, self._base, server.rank, loaded=loaded, places=server.places)
            await server.load(message.name, opened.folder)
            self._prompting[message.name] = message.prompting
        except FinetuneError as error:
            failure = Failure.from_error(error)
        self._send(AdapterLoaded(name=message.name, failure=failure))

    def _ask(self, ask: Ask) -> None:
        asked = self._asker.prepare(ask, self._prompting[ask.name])
        if isinstance(asked, Refused):
            self._send(asked)
            return
        task = self._tasks[ask.id] = asyncio.create_task(self._answer(ask, asked))
        task.add_done_callback(lambda done: self._note_end(ask.id, done))

    async def _answer(self, ask: Ask, asked: PreparedQuestion) -> None:
        has_begun = False
        # one that is ahead may wait in the program: at most for the next answer there that ends
        slot = nullcontext() if ask.ahead else self._slots
        try:
            async with slot, aclosing(self._tokens(ask.name, asked)) as bursts:
                async for tokens, is_over in bursts:
                    has_begun = True
                    texts = asked.answer.feed(tokens, is_over=is_over)
                    self._send(*texts)
                    if texts and isinstance(texts[-1], Ended):
                        break  # at a stop text there may be more to write
        except NotTakenError as error:
            if has_begun:  # it took the same prompt before
                raise engine_failed(str(error)) from error
            message = f"The engine refuses the question: {str(error)!a}."
            number = asked.answer.number
            self._send(Refused(id=number, code="refused_by_engine", message=message))
        self._answered += 1

    async def _tokens(
        self, name: str, asked: PreparedQuestion
    ) -> AsyncGenerator[tuple[list[int], bool]]:
        """Yield new tokens, and True with the last of them."""
        tally = Tally(asked.limits, self._asker.marks)
        while not tally.is_over:
            bursts = self._server.continue_text(
                name, [*asked.ids, *tally.tokens], asked.limits, tally.all_left
            )
            async with aclosing(bursts):
                async for burst in bursts:
                    tokens = tally.take(burst)
                    yield tokens, tally.is_over
                    if tally.is_over or tally.is_thinking_spent:
                        break
                else:
                    if not tally.is_over:  # the program has a limit of its own
                        yield [], True
                        return
            if tally.is_thinking_spent:
                yield tally.close_thinking(), tally.is_over

    def _note_end(self, number: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(number, None)
        self._note_trouble(task)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)
        task.add_done_callback(self._note_trouble)

    def _note_trouble(self, task: asyncio.Task[None]) -> None:
        """Let what one answer met end the session: the program is not sound any more."""
        if not task.cancelled() and (error := task.exception()) and not self._failed.done():
            self._failed.set_exception(error)

    def _send(self, *messages: Record) -> None:
        for message in messages:
            self._link.write(message.model_dump_json().encode() + b"\n")


def _end_tokens(base: str, declared: int) -> list[int]:
    """Return the end tokens that the base model's settings name, and the tokenizer's."""
    from transformers import GenerationConfig

    return with_end(GenerationConfig.from_pretrained(base).eos_token_id, declared)
