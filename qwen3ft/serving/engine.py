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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.rendering import encode_texts, generation_prompt, prompt_ids
from qwen3ft.chat.thinking import ThinkingChunk, ThinkingSplitter, is_opened
from qwen3ft.decoding.decoder import Decoder
from qwen3ft.decoding.fitting import CannotDecodeError, find_obstacle, run_within
from qwen3ft.decoding.slots import Query
from qwen3ft.decoding.writer import AnswerWriter, Written
from qwen3ft.decoding.writing import AnswerLimits, Marks
from qwen3ft.errors import (
    EnvironmentNotReadyError,
    FinetuneError,
    RequestError,
    TokenizerError,
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
    Piece,
    Prompting,
    Ready,
    Refused,
    ServeEnded,
    ServeRequest,
    Unload,
    to_worker,
)
from qwen3ft.records.training import Failure
from qwen3ft.serving.prompting import trained_prompting
from qwen3ft.serving.stops import StopFilter

if TYPE_CHECKING:
    from qwen3ft.records.model import ModelShape

logger = get_logger("engine")

LEAST_TEMPERATURE = 1e-5
"""Below it an answer is greedy: logits divided by less leave the range of fp32."""

ADAPTER_PLACES = 4
"""Adapters loaded at a time: one in use, one on trial, and two whose last answers are written."""

MOST_PROMPT_TOKENS = 8192
"""Longest prompt, unless the model takes less or the context is set."""

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


@dataclass
class _Answer:
    """An answer in progress: what turns its tokens into pieces of text."""

    prompt_tokens: int
    stream: Any  # tokenizers' DecodeStream
    splitter: ThinkingSplitter
    stops: StopFilter
    written: int = 0


class DecodingEngine:
    """The decoder with its adapters; answers are numbered by those who ask.

    Args:
        request: Base model, extent and limits.
    """

    def __init__(self, request: ServeRequest) -> None:
        opened = open_adapter(Path(request.adapter))
        self.base = find_base(opened)
        self.model, self.tokenizer = load_with_adapters(
            request.config, self.base, {_FIRST: opened.folder}
        )
        dtype = str(self.model.get_base_model().dtype).removeprefix("torch.")
        # the setting `kernels` is about training; here no other path answers many at once
        if obstacle := find_obstacle(self.model, request.device, dtype, "fused"):
            raise _cannot_decode(obstacle)
        self.rank = opened.spec.r
        self._marks = Marks.of(self.tokenizer, sorted(end_tokens(self.model, self.tokenizer)))
        self._shape = shape_of(Path(self.base))
        load = _expected_load(request, opened, self._shape)
        try:
            _, self.decoder = run_within(
                load, request.config.max_memory_gb, request.device, self._make_decoder
            )
        except CannotDecodeError as error:
            raise _cannot_decode(str(error)) from None
        self.model.delete_adapter(_FIRST)
        self.writer = AnswerWriter(self.decoder, [], SERVING_BURST_STEPS)
        self.answered = 0
        self._places: dict[str, int] = {}
        self._prompting: dict[str, Prompting] = {}
        self._answers: dict[int, _Answer] = {}

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
            messages += self._pieces(number, tokens, ends.get(number))
        return messages

    def _load(self, message: Load) -> None:
        opened = open_adapter(Path(message.folder))
        free = [place for place in range(ADAPTER_PLACES) if place not in self._places.values()]
        problem = ""
        if find_base(opened) != self.base:
            problem = "it stands on another base model"
        elif opened.spec.r > self.rank:
            problem = f"its rank is {opened.spec.r}, and there is room for {self.rank}"
        elif not free:
            problem = f"{ADAPTER_PLACES} adapters still answer"
        if problem:
            raise RequestError(
                f"The adapter in {opened.folder} is not loaded beside the others: {problem}.",
                why="Adapters that answer together share one base model and one reserved size.",
                next_command="qwen3ft serve",
            )
        require_fit(opened, self._shape)
        try:
            attach_adapter(self.model, _INCOMING, opened.folder)
            self.decoder.replace(free[0], _INCOMING)
        finally:  # what is left attached would be in the way of the next one
            if _INCOMING in self.model.peft_config:
                self.model.delete_adapter(_INCOMING)
        self._places[message.name] = free[0]
        self._prompting[message.name] = message.prompting

    def _ask(self, ask: Ask) -> Refused | None:
        """Begin an answer, or return why that is impossible."""
        prompting = self._prompting[ask.name]
        thinking = prompting.thinking if ask.thinking is None else ask.thinking
        try:
            if ask.text is None:
                prompt = generation_prompt(self.tokenizer, ask.messages, thinking)
                ids = prompt_ids(self.tokenizer, ask.messages, thinking, escape=prompting.escape)
            else:
                prompt, [ids] = ask.text, encode_texts(self.tokenizer, [ask.text])
        except TokenizerError as error:
            return Refused(id=ask.id, code="invalid_prompt", message=error.what)
        context = self.decoder.sizes.most_tokens
        room = context - len(ids)
        if not ids or room < (ask.max_tokens or 1):
            wanted = f" and {ask.max_tokens:,} of the answer" if ask.max_tokens else ""
            return Refused(
                id=ask.id,
                code="context_length_exceeded" if ids else "invalid_prompt",
                message=f"The prompt has {len(ids):,} tokens{wanted}; the limit for both together "
                f"is {context:,} tokens.",
            )
        opened = is_opened(prompt)
        is_drawn = ask.temperature >= LEAST_TEMPERATURE
        budget = prompting.thinking_tokens if thinking else 0
        limits = AnswerLimits(
            answer_tokens=ask.max_tokens or prompting.answer_tokens,
            thinking_tokens=budget,
            opened=opened,
            seed=ask.seed if is_drawn else None,
            all_tokens=min(ask.max_tokens or room, room),
            temperature=ask.temperature if is_drawn else 1.0,
            top_p=ask.top_p,
        )
        self.writer.add(ask.id, Query(ids, limits, self._places[ask.name]))
        self._answers[ask.id] = _Answer(
            len(ids), _decode_stream(), ThinkingSplitter(opened=opened), StopFilter(ask.stop)
        )
        return None

    def _pieces(self, number: int, tokens: list[int], end: Written | None) -> Iterator[Record]:
        """Yield the text of new tokens, and the end of the answer if it has ended."""
        answer = self._answers[number]
        answer.written += len(tokens)
        steps = (answer.stream.step(self.tokenizer.backend_tokenizer, token) for token in tokens)
        parts: list[ThinkingChunk] = answer.splitter.feed("".join(text or "" for text in steps))
        if end is not None:
            parts += answer.splitter.close()
        for part, text in parts:
            shown = answer.stops.feed(text) if part == "answer" else text
            if shown:
                yield Piece(id=number, part=part, text=shown)
        if end is None and not answer.stops.found:
            return
        if rest := answer.stops.close():
            yield Piece(id=number, part="answer", text=rest)
        by_itself = end is not None and bool(end.tokens) and end.tokens[-1] in self._marks.ends
        self.writer.cancel(number)  # at a stop text there may be more to write
        del self._answers[number]
        self.answered += 1
        yield Ended(
            id=number,
            reason="stop" if by_itself or answer.stops.found else "length",
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.written,
        )


def _decode_stream() -> Any:
    from tokenizers.decoders import DecodeStream

    return DecodeStream(skip_special_tokens=True)


def _expected_load(request: ServeRequest, opened: OpenedAdapter, shape: ModelShape) -> AnswerLoad:
    """Return what the decoder is sized for: all slots in use, answers as long as in the test."""
    prompting = trained_prompting(opened.provenance)
    longest = prompting.answer_tokens + prompting.thinking_tokens
    context = request.context_tokens or longest + MOST_PROMPT_TOKENS
    context = min(context, shape.max_position_embeddings)
    answer = min(longest, context // 2)
    return AnswerLoad(
        shape=shape,
        ranks=(opened.spec.r,) * ADAPTER_PLACES,
        questions=request.slots,
        prompt_tokens=context - answer,
        typical_prompt_tokens=min(_TYPICAL_TOKENS, context / 2),
        answer_tokens=answer,
        typical_answer_tokens=min(_TYPICAL_TOKENS, answer),
        compute_bytes=4 if request.device == "cpu" else 2,
    )


def _cannot_decode(reason: str) -> EnvironmentNotReadyError:
    return EnvironmentNotReadyError(
        f"The decoder cannot serve this model here: {reason}.",
        why="It writes all answers of the product's own server, within max_memory_gb.",
        next_command="qwen3ft serve --slots 1 --context-tokens 1024",
    )
