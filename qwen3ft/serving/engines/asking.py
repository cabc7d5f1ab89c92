"""Questions become prompts with limits, and tokens become text: alike for every engine.

Engines take and give token ids. So whatever computes, a prompt is the one that the run's test
asked, and limits, thinking, stop texts and counts are those of the product's own decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.rendering import encode_texts, encoded_prompt
from qwen3ft.chat.templates import identify_template, template_may_think
from qwen3ft.chat.thinking import ThinkingChunk, ThinkingSplitter, is_opened
from qwen3ft.decoding.writing import AnswerLimits, Marks
from qwen3ft.errors import TokenizerError
from qwen3ft.records.serving import Ask, Ended, Piece, Prompting, Refused
from qwen3ft.serving.stops import StopFilter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_TEMPERATURE = 1e-5
"""Below it an answer is greedy: logits divided by less leave the range of fp32."""


class AnswerText:
    """The text of one answer while it is written.

    Args:
        number: Its number.
        tokenizer: Its tokenizer.
        prompt_tokens: Tokens of its prompt.
        opened: The prompt ends with the opening tag of thinking.
        stops: Texts that end it.
        ends: End tokens.
    """

    def __init__(
        self,
        number: int,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        *,
        opened: bool,
        stops: Sequence[str],
        ends: Sequence[int],
    ) -> None:
        self.number, self._ends = number, ends
        self._backend = tokenizer.backend_tokenizer
        self._prompt_tokens, self._written, self._last = prompt_tokens, 0, -1
        self._stream, self._unsaid = _decode_stream(), list[int]()
        self._splitter, self._stops = ThinkingSplitter(opened=opened), StopFilter(stops)

    def feed(self, tokens: Sequence[int], *, is_over: bool) -> list[Piece | Ended]:
        """Add tokens; return their text, and the end if they are the last or hold a stop text."""
        self._written += len(tokens)
        self._last = tokens[-1] if tokens else self._last
        parts: list[ThinkingChunk] = self._splitter.feed(self._decode(tokens, is_over=is_over))
        if is_over:
            parts += self._splitter.close()
        records: list[Piece | Ended] = []
        for part, text in parts:
            shown = self._stops.feed(text) if part == "answer" else text
            if shown:
                records.append(Piece(id=self.number, part=part, text=shown))
        if not is_over and not self._stops.found:
            return records
        if rest := self._stops.close():
            records.append(Piece(id=self.number, part="answer", text=rest))
        by_itself = is_over and self._last in self._ends
        ended = Ended(
            id=self.number,
            reason="stop" if by_itself or self._stops.found else "length",
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._written,
        )
        return [*records, ended]

    def _decode(self, tokens: Sequence[int], *, is_over: bool) -> str:
        """Return the text of tokens, without a character that is not complete until the end."""
        texts = []
        for token in tokens:
            self._unsaid.append(token)
            if text := self._stream.step(self._backend, token):
                texts.append(text)
                self._unsaid.clear()
        if is_over:  # a limit cut the answer within a character
            texts.append(self._backend.decode(self._unsaid, skip_special_tokens=True))
        return "".join(texts)


@dataclass(frozen=True)
class PreparedQuestion:
    """A question that fits: its prompt, its limits, and the text that it is answered with."""

    ids: list[int]
    limits: AnswerLimits
    answer: AnswerText


class Asker:
    """Makes prompts of questions.

    Args:
        tokenizer: Tokenizer of the base model.
        marks: Token ids that steer the writing.
        context_tokens: Most tokens of a prompt and its answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, marks: Marks, context_tokens: int
    ) -> None:
        self.tokenizer, self.marks, self.context_tokens = tokenizer, marks, context_tokens
        self._may_think = template_may_think(identify_template(tokenizer).sha256)

    def prepare(self, ask: Ask, prompting: Prompting) -> PreparedQuestion | Refused:
        """Return the question as an engine takes it, or why that is impossible."""
        thinking = prompting.thinking if ask.thinking is None else ask.thinking
        try:
            if ask.text is None:
                escape = prompting.escape
                prompt, ids = encoded_prompt(self.tokenizer, ask.messages, thinking, escape=escape)
            else:
                prompt, [ids] = ask.text, encode_texts(self.tokenizer, [ask.text])
        except TokenizerError as error:
            return Refused(id=ask.id, code="invalid_prompt", message=error.what)
        if ask.thinking and not self._may_think:
            message = "enable_thinking cannot be true: this model's chat template has no thinking."
            return Refused(id=ask.id, code="invalid_prompt", message=message)
        room = self.context_tokens - len(ids)
        if not ids or room < (ask.max_tokens or 1):
            wanted = f" and {ask.max_tokens:,} of the answer" if ask.max_tokens else ""
            return Refused(
                id=ask.id,
                code="context_length_exceeded" if ids else "invalid_prompt",
                message=f"The prompt has {len(ids):,} tokens{wanted}; the limit for both together "
                f"is {self.context_tokens:,} tokens.",
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
        answer = AnswerText(
            *(ask.id, self.tokenizer, len(ids)),
            opened=opened,
            stops=ask.stop,
            ends=self.marks.ends,
        )
        return PreparedQuestion(ids, limits, answer)


def _decode_stream() -> Any:
    from tokenizers.decoders import DecodeStream

    return DecodeStream(skip_special_tokens=True)
