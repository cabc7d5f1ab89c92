"""Two ways to write an answer in a chat: the decoder where it can run, else transformers.

Both are greedy, as in the inference test, keep the same thinking budget, and feed the same streamer
with tokens, so that the same answer comes in the same pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from qwen3ft.decoding.decoder import Decoder
from qwen3ft.decoding.fitting import CannotDecodeError, find_obstacle, run_within
from qwen3ft.decoding.slots import Query
from qwen3ft.decoding.writer import AnswerWriter
from qwen3ft.decoding.writing import AnswerLimits, Marks
from qwen3ft.evaluation.generation import end_tokens, greedy_settings
from qwen3ft.evaluation.thinking_budget import ThinkingBudget
from qwen3ft.logs import get_logger
from qwen3ft.planning.decoder_sizes import AnswerLoad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen3ft.records.model import ModelShape
    from qwen3ft.records.requests import AskRequest

logger = get_logger("answer")

CHAT_BURST_STEPS = 2
"""Tokens between two looks at what was written: each look waits for the GPU."""

FIRST_PROMPT_TOKENS = 4096
"""Prompt that the first decoder has room for; a longer conversation gets a decoder of its own."""


class Voice(Protocol):
    """Writer of one answer at a time."""

    def write(
        self,
        ids: Sequence[int],
        limits: AnswerLimits,
        streamer: Any,
        is_wanted: Callable[[], bool],
    ) -> list[int]:
        """Return the answer's tokens, the end token included.

        Args:
            ids: Tokens of the prompt.
            limits: Extent of the answer.
            streamer: Transformers' streamer; gets the prompt, then every token.
            is_wanted: Asked every few tokens; False ends the answer.
        """


def open_voice(
    model: Any, tokenizer: PreTrainedTokenizerBase, shape: ModelShape, request: AskRequest
) -> Voice:
    """Return the decoder for a PEFT model, ready to write; or transformers, and log why."""
    dtype = str(model.get_base_model().dtype).removeprefix("torch.")
    obstacle = find_obstacle(model, request.device, dtype, request.config.kernels)
    if not obstacle:
        try:
            return DecoderVoice(model, tokenizer, shape, request)
        except CannotDecodeError as error:
            obstacle = str(error)
    logger.info("transformers answers (%s)", obstacle)
    return PlainVoice(model, tokenizer)


class DecoderVoice:
    """The decoder with one slot.

    Args:
        model: PEFT model with one adapter.
        tokenizer: Its tokenizer.
        shape: Shape of its base.
        request: Budget, and the longest answer.

    Raises:
        CannotDecodeError: it does not fit, or a kernel does not compile here.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        shape: ModelShape,
        request: AskRequest,
    ) -> None:
        self._model, self._tokenizer, self._shape, self._request = model, tokenizer, shape, request
        self.marks = Marks.of(tokenizer, sorted(end_tokens(model, tokenizer)))
        config = request.config
        longest = AnswerLimits(config.max_new_tokens, config.max_thinking_tokens)
        self._answer_tokens = longest.most_tokens(self.marks)
        self._decoder: Decoder | None = self._made_for(FIRST_PROMPT_TOKENS)

    def write(
        self,
        ids: Sequence[int],
        limits: AnswerLimits,
        streamer: Any,
        is_wanted: Callable[[], bool],
    ) -> list[int]:
        """Write an answer; see `Voice`."""
        import torch

        decoder = self._decoder_for(len(ids))
        if decoder is None:
            plain = PlainVoice(self._model, self._tokenizer)
            return plain.write(ids, limits, streamer, is_wanted)
        streamer.put(torch.tensor(ids))
        tokens: list[int] = []
        writer = AnswerWriter(decoder, [Query(ids, limits, model=0)], CHAT_BURST_STEPS)
        for news, _ in writer.bursts():
            for _, new in news:
                for token in new:
                    streamer.put(torch.tensor([token]))
                tokens += new
            if not is_wanted():
                self._decoder = None  # its slot is taken
                break
        streamer.end()
        return tokens

    def _decoder_for(self, prompt_tokens: int) -> Decoder | None:
        """Return a decoder for such a prompt, made anew if need be; None if none fits."""
        decoder = self._decoder
        if decoder and prompt_tokens + self._answer_tokens <= decoder.sizes.most_tokens:
            return decoder
        self._decoder = decoder = None  # makes room for the next
        for roomy_tokens in (2 * prompt_tokens, prompt_tokens):  # a conversation grows
            try:
                self._decoder = self._made_for(roomy_tokens)
                return self._decoder
            except CannotDecodeError as error:
                obstacle = str(error)
        logger.info("transformers answers %d tokens (%s)", prompt_tokens, obstacle)
        return None

    def _load_for(self, prompt_tokens: int) -> AnswerLoad:
        model = self._model
        [name] = model.peft_config
        return AnswerLoad(
            shape=self._shape,
            ranks=(model.peft_config[name].r,),
            questions=1,
            prompt_tokens=prompt_tokens,
            typical_prompt_tokens=prompt_tokens / 2,
            answer_tokens=self._answer_tokens,
            typical_answer_tokens=self._answer_tokens / 2,
            drawn=False,
            compute_bytes=model.get_base_model().dtype.itemsize,
        )

    def _made_for(self, prompt_tokens: int) -> Decoder:
        """Return a decoder with room for such a prompt and an answer."""
        model, load = self._model, self._load_for(prompt_tokens)
        [name] = model.peft_config

        def make(sizes: Any) -> Decoder:
            decoder = Decoder(model, [name], sizes, self.marks)
            decoder.capture(draw=False)
            return decoder

        request = self._request
        # With one slot, copies in 16 bits save little time, and a chat may stay open for long.
        budget_gb = request.config.max_memory_gb
        _, decoder = run_within(load, budget_gb, request.device, make, resident=False)
        logger.info("the decoder answers, up to %d tokens", load.most_tokens)
        return decoder


class PlainVoice:
    """transformers' `generate`.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.marks = Marks.of(tokenizer, sorted(end_tokens(model, tokenizer)))

    def write(
        self,
        ids: Sequence[int],
        limits: AnswerLimits,
        streamer: Any,
        is_wanted: Callable[[], bool],
    ) -> list[int]:
        """Write an answer; see `Voice`."""
        import torch
        from transformers import StoppingCriteriaList

        budget = ThinkingBudget([limits], self.marks, self._model.device)
        inputs = torch.tensor([ids], device=self._model.device)

        def watch(tokens: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            unwanted = not is_wanted()
            return torch.full((len(tokens),), unwanted, dtype=torch.bool, device=tokens.device)

        output = self._model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=greedy_settings(self._model, self._tokenizer, budget.most_tokens),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([budget.watch, watch]),
            logits_processor=[budget.force],
        )
        tokens: list[int] = output[0, len(ids) :].tolist()
        return tokens
