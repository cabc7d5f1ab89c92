"""The worker's side of the server: many questions at once on the decoder, for several adapters.

Questions arrive on a Unix socket and answers leave on it while they are written
(`qwen3ft.records.serving`). All adapters share the base model; each has one of `ADAPTER_PLACES`, so
that loading another one changes no shape and disturbs no answer in progress.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3ft.decoding.decoder import Decoder
from qwen3ft.decoding.fitting import CannotDecodeError, find_obstacle, run_within
from qwen3ft.decoding.slots import Query
from qwen3ft.decoding.writer import AnswerWriter
from qwen3ft.decoding.writing import Marks
from qwen3ft.errors import (
    EnvironmentNotReadyError,
    FinetuneError,
)
from qwen3ft.evaluation.generation import end_tokens
from qwen3ft.evaluation.inference import attach_adapter, load_with_adapters
from qwen3ft.logs import get_logger
from qwen3ft.model.saved_adapter import (
    OpenedAdapter,
    find_base,
    open_adapter,
    require_fit,
    shape_of,
)
from qwen3ft.planning.decoder_sizes import AnswerLoad, DecoderSizes
from qwen3ft.records.base import Record
from qwen3ft.records.serving import (
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
    Unload,
    to_worker,
)
from qwen3ft.records.training import Failure
from qwen3ft.serving.engines.asking import AnswerText, Asker
from qwen3ft.serving.engines.places import ADAPTER_PLACES, choose_context, require_place
from qwen3ft.serving.prompting import trained_prompting

if TYPE_CHECKING:
    from qwen3ft.records.model import ModelShape

logger = get_logger("engine")

SERVING_BURST_STEPS = 4
"""Tokens between two looks at the socket."""

_TYPICAL_TOKENS = 256
_IDLE_SECONDS = 1.0
_FIRST, _INCOMING = "first", "incoming"


def serve_session(request: ServeRequest, beat: Callable[[str], None]) -> ServeEnded:
    """Load the base model, then load adapters and answer until the server ends the session.

    Raises:
        ModelNotFoundError, SaveError, ModelUnavailableError: as `load_finetuned_model`.
        EnvironmentNotReadyError: the decoder cannot run this model here, or not within the budget.
    """
    engine = DecodingEngine(request)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(request.socket)
        sizes = engine.decoder.sizes
        ready = Ready(slots=sizes.slots, context_tokens=sizes.most_tokens, places=ADAPTER_PLACES)
        _send(link, [ready])
        received, beaten = b"", 0.0
        while True:
            wait_seconds = 0.0 if engine.writer.is_busy else _IDLE_SECONDS
            if select.select([link], [], [], wait_seconds)[0]:
                news = link.recv(2**20)
                *lines, received = (received + news).split(b"\n")
                messages = [to_worker.validate_json(line) for line in lines]
                if not news or any(isinstance(message, Close) for message in messages):
                    return ServeEnded(answered=engine.answered)
                _send(link, [reply for message in messages for reply in engine.handle(message)])
            if engine.writer.is_busy:
                _send(link, engine.write())
            if time.monotonic() - beaten >= _IDLE_SECONDS:
                beat("answer" if engine.writer.is_busy else "wait")
                beaten = time.monotonic()


def _send(link: socket.socket, messages: Sequence[Record]) -> None:
    if messages:
        link.sendall(b"".join(message.model_dump_json().encode() + b"\n" for message in messages))


class DecodingEngine:
    """The decoder with its adapters; answers are numbered by those who ask.

    Args:
        request: Base model, extent and limits.
    """

    def __init__(self, request: ServeRequest) -> None:
        opened = open_adapter(Path(request.adapter))
        self.base = find_base(opened)
        self.model, tokenizer = load_with_adapters(
            request.config, self.base, {_FIRST: opened.folder}
        )
        dtype = str(self.model.get_base_model().dtype).removeprefix("torch.")
        # the setting `kernels` is about training; here no other path answers many at once
        if obstacle := find_obstacle(self.model, request.device, dtype, "fused"):
            raise _hindered(obstacle)
        self.rank = opened.spec.r
        self._marks = Marks.of(tokenizer, sorted(end_tokens(self.model, tokenizer)))
        self._shape = shape_of(Path(self.base))
        load = _expected_load(request, opened, self._shape)
        try:
            _, self.decoder = run_within(
                *(load, request.config.max_memory_gb, request.device, self._make_decoder),
                most_slots=request.slots,
            )
        except CannotDecodeError as error:
            raise _cannot_decode(str(error)) from None
        self.model.delete_adapter(_FIRST)
        self.writer = AnswerWriter(self.decoder, [], SERVING_BURST_STEPS)
        self._asker = Asker(tokenizer, self._marks, self.decoder.sizes.most_tokens)
        self.answered = 0
        self._places: dict[str, int] = {}
        self._prompting: dict[str, Prompting] = {}
        self._answers: dict[int, AnswerText] = {}

    def _make_decoder(self, sizes: DecoderSizes) -> Decoder:
        # every place holds the first adapter, until another one is loaded into it
        names = [_FIRST] * ADAPTER_PLACES
        decoder = Decoder(
            self.model, names, sizes, self._marks, most_draws=sizes.most_tokens, shaped=True
        )
        decoder.capture(draw=True)
        return decoder

    def handle(self, message: Load | Unload | Ask | Cancel | Close) -> Iterator[Record]:
        """Do what a message asks for; yield what is to be replied at once."""
        if isinstance(message, Load):
            try:
                self._load(message)
                yield AdapterLoaded(name=message.name)
            except FinetuneError as error:
                yield AdapterLoaded(name=message.name, failure=Failure.from_error(error))
        elif isinstance(message, Unload):
            self._places.pop(message.name)
            self._prompting.pop(message.name)
        elif isinstance(message, Ask):
            refusal = self._ask(message)
            if refusal is not None:
                yield refusal
        elif isinstance(message, Cancel):
            self.writer.cancel(message.id)
            self._answers.pop(message.id, None)

    def write(self) -> list[Record]:
        """Write a few tokens of every answer; return the texts and the ends."""
        news, ended = self.writer.burst()
        ends = dict(ended)
        messages: list[Record] = []
        for number, tokens in news:
            texts = self._answers[number].feed(tokens, is_over=number in ends)
            messages += texts
            if texts and isinstance(texts[-1], Ended):
                self.writer.cancel(number)  # at a stop text there may be more to write
                del self._answers[number]
                self.answered += 1
        return messages

    def _load(self, message: Load) -> None:
        opened = open_adapter(Path(message.folder))
        loaded = len(self._places)
        require_place(opened, self.base, self.rank, loaded=loaded, places=ADAPTER_PLACES)
        require_fit(opened, self._shape)
        free = min(set(range(ADAPTER_PLACES)) - set(self._places.values()))
        try:
            attach_adapter(self.model, _INCOMING, opened.folder)
            self.decoder.replace(free, _INCOMING)
        finally:  # what is left attached would be in the way of the next one
            if _INCOMING in self.model.peft_config:
                self.model.delete_adapter(_INCOMING)
        self._places[message.name] = free
        self._prompting[message.name] = message.prompting

    def _ask(self, ask: Ask) -> Refused | None:
        """Begin an answer, or return why that is impossible."""
        asked = self._asker.prepare(ask, self._prompting[ask.name])
        if isinstance(asked, Refused):
            return asked
        query = Query(asked.ids, asked.limits, self._places[ask.name])
        self.writer.add(ask.id, query, ahead=ask.ahead)
        self._answers[ask.id] = asked.answer
        return None


def _expected_load(request: ServeRequest, opened: OpenedAdapter, shape: ModelShape) -> AnswerLoad:
    """Return what the decoder is sized for: all slots in use, answers as long as in the test."""
    prompting = trained_prompting(opened.provenance)
    context = choose_context(request, prompting, shape)
    answer = min(prompting.answer_tokens + prompting.thinking_tokens, context // 2)
    return AnswerLoad(
        shape=shape,
        ranks=(opened.spec.r,) * ADAPTER_PLACES,
        questions=request.slots,
        prompt_tokens=context - answer,
        typical_prompt_tokens=min(_TYPICAL_TOKENS, context / 2),
        answer_tokens=answer,
        typical_answer_tokens=min(_TYPICAL_TOKENS, answer),
        read_tokens=context,  # a prompt may leave an answer less than expected
        compute_bytes=4 if request.device == "cpu" else 2,
    )


def _hindered(obstacle: str) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"The decoder cannot serve this model here: {obstacle}.",
        why="Neither fewer answers at a time nor shorter ones would change that.",
        next_command="qwen3ft serve --engine llama.cpp",
    )


def _cannot_decode(reason: str) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"The decoder cannot serve this model here: {reason}.",
        why="It writes all answers of the product's own server, within max_memory_gb.",
        next_command="qwen3ft serve --slots 1 --context-tokens 1024",
    )
