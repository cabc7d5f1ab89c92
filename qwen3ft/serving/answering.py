"""The worker's side of a chat: read questions from a file, and stream the answers into another.

Answers are greedy, as they were in the inference test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.rendering import generation_prompt, prompt_ids
from qwen3ft.chat.thinking import THINK_OPEN, ThinkingChunk, ThinkingSplitter
from qwen3ft.evaluation.generation import end_tokens, greedy_settings
from qwen3ft.evaluation.inference import InferenceTester
from qwen3ft.files import append_json_line, lines_from
from qwen3ft.jobs.folders import JobDir
from qwen3ft.records.requests import AskRequest, ChatEnded, ChatQuestion, Chunk

if TYPE_CHECKING:
    import torch
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
    responder = Responder(model, tokenizer, request, job, beat)
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
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        request: AskRequest,
        job: JobDir,
        beat: Callable[[str], None],
    ) -> None:
        self.model, self.tokenizer, self.request, self.job = model, tokenizer, request, job
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
        import torch
        from transformers import StoppingCriteriaList

        thinking = self.request.thinking
        escape = self.request.config.special_tokens_in_text == "escape"
        ids = prompt_ids(self.tokenizer, messages, thinking, escape=escape)
        prompt = generation_prompt(self.tokenizer, messages, thinking)
        splitter = ThinkingSplitter(opened=prompt.rstrip().endswith(THINK_OPEN))

        def emit(text: str, end: bool) -> None:
            self._send_parts(splitter.feed(text))
            if end:
                self._send_parts(splitter.close())

        inputs = torch.tensor([ids], device=self.model.device)
        output = self.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=greedy_settings(
                self.model, self.tokenizer, self.request.config.max_new_tokens
            ),
            streamer=_streamer(self.tokenizer, emit),
            stopping_criteria=StoppingCriteriaList([self._watch]),
        )
        written = output[0, len(ids) :].tolist()
        stopped = bool(written) and written[-1] in end_tokens(self.model, self.tokenizer)
        self.send(Chunk(kind="end", tokens=len(written), stopped=stopped))

    def _send_parts(self, parts: list[ThinkingChunk]) -> None:
        for kind, text in parts:
            self.send(Chunk(kind=kind, text=text))

    def _watch(self, tokens: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
        """Stop generating once the chat has been ended (a stopping criterion)."""
        import torch

        self.beat("answer")
        unwanted = self.job.stop.exists()
        return torch.full((len(tokens),), unwanted, dtype=torch.bool, device=tokens.device)


def _streamer(tokenizer: PreTrainedTokenizerBase, emit: Callable[[str, bool], None]) -> Any:
    """Return Transformers' streamer: it emits text as soon as no later token can change it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text, stream_end)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
