"""The worker's side of a chat: read questions from a file, and stream the answers into another.

Answers are greedy, as they were in the inference test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.rendering import encoded_prompt
from qwen3ft.chat.thinking import ThinkingChunk, ThinkingSplitter, is_opened
from qwen3ft.decoding.writing import AnswerLimits
from qwen3ft.disk.files import append_json_line, lines_from
from qwen3ft.evaluation.generation import end_tokens
from qwen3ft.evaluation.inference import InferenceTester
from qwen3ft.jobs.folders import JobDir
from qwen3ft.model.saved_adapter import find_base, open_adapter, shape_of
from qwen3ft.records.requests import AskRequest, ChatEnded, ChatQuestion, Chunk
from qwen3ft.serving.voices import Voice, open_voice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WAIT_SECONDS = 0.05
BEAT_SECONDS = 1.0


def answer_session(request: AskRequest, job: JobDir, beat: Callable[[str], None]) -> ChatEnded:
    """Load the adapter, then answer questions until the chat ends.

    Raises:
        ModelNotFoundError, SaveError, ModelUnavailableError: as `load_finetuned_model`.
        TokenizerError: the chat template cannot be used.
    """
    model, tokenizer = InferenceTester(request.config).load_finetuned_model(request.adapter)
    shape = shape_of(Path(find_base(open_adapter(Path(request.adapter)))))
    voice = open_voice(model, tokenizer, shape, request)
    responder = Responder(voice, model, tokenizer, request, job, beat)
    responder.send(Chunk(kind="ready"))
    offset = answered = 0
    while True:
        for line in lines_from(job.questions, offset):
            question, offset = ChatQuestion.model_validate_json(line.content), line.end_offset
            if question.end or job.stop.exists():
                return ChatEnded(answered=answered)
            responder.answer(question.messages)
            answered += 1
        responder.beat("wait")
        time.sleep(WAIT_SECONDS)


class Responder:
    """A loaded model that streams its answers."""

    def __init__(
        self,
        voice: Voice,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        request: AskRequest,
        job: JobDir,
        beat: Callable[[str], None],
    ) -> None:
        self.voice, self.tokenizer, self.request, self.job = voice, tokenizer, request, job
        self._ends = end_tokens(model, tokenizer)
        self._beat = beat
        self._beaten = 0.0

    def send(self, chunk: Chunk) -> None:
        """Send a chunk to the process that asked."""
        append_json_line(self.job.pieces, chunk.model_dump(mode="json"))

    def beat(self, phase: str) -> None:
        """Write a heartbeat, at most once a second."""
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            self._beaten = time.monotonic()
            self._beat(phase)

    def answer(self, messages: tuple[dict[str, Any], ...]) -> None:
        """Stream the assistant's next turn."""
        thinking, config = self.request.thinking, self.request.config
        escape = config.special_tokens_in_text == "escape"
        prompt, ids = encoded_prompt(self.tokenizer, messages, thinking, escape=escape)
        limits = AnswerLimits(
            answer_tokens=config.max_new_tokens,
            thinking_tokens=config.max_thinking_tokens if thinking else 0,
            opened=is_opened(prompt),
        )
        splitter = ThinkingSplitter(opened=limits.opened)

        def emit(text: str, end: bool) -> None:
            self._send_parts(splitter.feed(text))
            if end:
                self._send_parts(splitter.close())

        streamer = _streamer(self.tokenizer, emit)
        written = self.voice.write(ids, limits, streamer, self._is_wanted)
        stopped = bool(written) and written[-1] in self._ends
        self.send(Chunk(kind="end", tokens=len(written), stopped=stopped))

    def _send_parts(self, parts: list[ThinkingChunk]) -> None:
        for kind, text in parts:
            self.send(Chunk(kind=kind, text=text))

    def _is_wanted(self) -> bool:
        """Return False once the chat has been ended."""
        self.beat("answer")
        return not self.job.stop.exists()


def _streamer(tokenizer: PreTrainedTokenizerBase, emit: Callable[[str, bool], None]) -> Any:
    """Return Transformers' streamer: it emits text as soon as no later token can change it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text, stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
