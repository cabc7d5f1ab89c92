"""Rendering of conversations by skeletons: one per shape, checked against the template itself.

The first and then every 1,000th row of a shape is compared with the template's own rendering, and
its prompt with that of inference; a difference raises `TokenizerError`. Tools and tool calls are
slots if the template is a known one (`qwen3ft.chat.templates`). An unknown template may branch on
their content, so it renders each such row itself. Memory is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from qwen3ft.chat.conversation import Conversation, Shape
from qwen3ft.chat.skeleton import Skeleton, Slot, build_skeleton, sentinel_copy
from qwen3ft.chat.templates import (
    REST_OF_EMPTY_BLOCK,
    TOOL_RESPONSE,
    apply_template,
    identify_template,
    opens_block,
    probe_thinking,
    template_error,
    template_text,
)
from qwen3ft.chat.tokenizer import Encoder
from qwen3ft.logs import mask_secrets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECK_EVERY_ROWS = 1000
MAX_SHAPES = 2048
"""Cached skeletons; rows of one question and one answer have two shapes."""

SHOWN_CHARACTERS = 60


class Renderer:
    """Encoder, template and cached skeletons of one tokenizer; made by `renderer_of`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.template = template_text(tokenizer)
        self.thinking = probe_thinking(tokenizer)
        self.encoder = Encoder(tokenizer)
        self._is_known = bool(identify_template(tokenizer).name)
        self._drops_earlier = self._is_known and self.thinking.drops_earlier
        self._skeletons: dict[Shape, Skeleton] = {}
        # Texts in tools that could be taken for sentinels or added tokens become slots.
        self._protected = re.compile(f"\ue000|{self.encoder.added_tokens.pattern}")

    def row(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation
    ) -> tuple[Skeleton, list[str]]:
        """Return the skeleton of a whole conversation and the texts for its slots.

        Raises:
            TokenizerError: the template cannot be used, or renders this row differently from
                others of its shape.
        """
        whole = conversation
        # The template renders both alike, and there are fewer shapes without that reasoning.
        if self._drops_earlier and len(whole.messages) > 2:
            conversation = _without_dropped(whole)
        shape = conversation.shape
        skeleton = self._skeletons.get(shape)
        if skeleton is None:
            skeleton = self._build(tokenizer, conversation, self._copy(conversation))
            if len(self._skeletons) >= MAX_SHAPES:
                self._skeletons.clear()
            self._skeletons[shape] = skeleton
        seen, skeleton.rows_seen = skeleton.rows_seen, skeleton.rows_seen + 1
        if self._is_known or not _has_data(shape):
            texts = conversation.texts()
            unsure = False
        else:
            # An unknown template may branch on the content of tools: render this row by itself.
            copy, slots = self._copy(conversation)
            skeleton = self._build(tokenizer, conversation, (copy, slots))
            texts = [slot.text for slot in slots]
            unsure = any(slot.owner == "data" for slot in slots)
        if unsure or seen % CHECK_EVERY_ROWS == 0:
            self._check(tokenizer, whole, skeleton, texts)
        return skeleton, texts

    def prompt(
        self, tokenizer: PreTrainedTokenizerBase, history: Conversation, thinking: bool
    ) -> tuple[Skeleton, list[str]]:
        """Return the skeleton of the prompt for the assistant's next turn, and its texts.

        Raises:
            TokenizerError: the template cannot be used, or renders these texts differently from
                others.
        """
        copy, slots = sentinel_copy(history, self._protected)
        rendered = self._render_prompt(tokenizer, copy, thinking)
        skeleton = self._cut(rendered, slots, history, is_prompt=True)
        texts = [slot.text for slot in slots]
        own = self._render_prompt(tokenizer, history, thinking)
        _check_equal("".join(skeleton.unit_texts(texts)), own)
        return skeleton, texts

    def _copy(self, conversation: Conversation) -> tuple[Conversation, list[Slot]]:
        return sentinel_copy(conversation, None if self._is_known else self._protected)

    def _build(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversation: Conversation,
        marked: tuple[Conversation, list[Slot]],
    ) -> Skeleton:
        copy, slots = marked
        rendered = apply_template(tokenizer, *copy, thinking=_thinks(conversation))
        return self._cut(rendered, slots, conversation, is_prompt=False)

    def _cut(
        self, rendered: str, slots: Sequence[Slot], conversation: Conversation, *, is_prompt: bool
    ) -> Skeleton:
        turns = sum(message["role"] == "assistant" for message in conversation.messages)
        split = self.encoder.split_tokens
        skeleton = build_skeleton(
            rendered, slots, turns, self.thinking.prefills, split, is_prompt=is_prompt
        )
        skeleton.ids = [
            self.encoder.encode_cached("".join(map(str, unit.parts))) if unit.is_template else None
            for unit in skeleton.units
        ]
        return skeleton

    def _render_prompt(
        self, tokenizer: PreTrainedTokenizerBase, history: Conversation, thinking: bool
    ) -> str:
        rendered = apply_template(tokenizer, *history, prompt=True, thinking=thinking)
        return rendered + (REST_OF_EMPTY_BLOCK if not thinking and opens_block(rendered) else "")

    def _check(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversation: Conversation,
        skeleton: Skeleton,
        texts: Sequence[str],
    ) -> None:
        """Raise unless the row and its prompt equal the template's own rendering."""
        thinks = _thinks(conversation)
        pieces = skeleton.unit_texts(texts)
        own = apply_template(tokenizer, *conversation, thinking=thinks)
        _check_equal("".join([*pieces, skeleton.tail]), own)
        last = next(i for i, u in enumerate(skeleton.units) if u.turn == skeleton.turns - 1)
        given = "".join(pieces[:last])
        history = conversation.history
        prompt = self._render_prompt(tokenizer, history, thinks)
        if given != prompt:
            raise template_error(
                "The chat template does not continue its own prompt: inference starts from "
                f"{_around(prompt, given)}, a training row has {_around(given, prompt)}.",
                "Training would teach a format that inference does not use.",
            )


_renderers: WeakKeyDictionary[PreTrainedTokenizerBase, Renderer] = WeakKeyDictionary()


def renderer_of(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Return the renderer of the tokenizer; a new one if its template has changed.

    Raises:
        TokenizerError: the tokenizer or its template cannot be used.
    """
    renderer = _renderers.get(tokenizer)
    if renderer is None or renderer.template != template_text(tokenizer):
        renderer = _renderers[tokenizer] = Renderer(tokenizer)
    return renderer


def _thinks(conversation: Conversation) -> bool:
    return bool(conversation.messages[-1].get("reasoning"))


def _without_dropped(conversation: Conversation) -> Conversation:
    """Return the conversation without reasoning before the last question."""
    messages = conversation.messages
    asked = max(
        (
            index
            for index, message in enumerate(messages)
            if message["role"] == "user" and not message["content"].startswith(TOOL_RESPONSE)
        ),
        default=0,
    )
    if not any(message.get("reasoning") for message in messages[:asked]):
        return conversation
    earlier = [{**message, "reasoning": ""} for message in messages[:asked]]
    return Conversation([*earlier, *messages[asked:]], conversation.tools)


def _has_data(shape: Shape) -> bool:
    tools, messages = shape
    return bool(tools) or any(calls for *_, calls in messages)


def _check_equal(built: str, own: str) -> None:
    if built != own:
        raise template_error(
            "The chat template renders a row differently from others of its shape: "
            f"{_around(own, built)} instead of {_around(built, own)}.",
            "It branches on the content of a message.",
        )


def _around(text: str, other: str) -> str:
    """Return `text` around its first difference from `other`, with secrets masked."""
    pairs = enumerate(zip(text, other, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))
    shown = text[max(0, at - SHOWN_CHARACTERS) : at + SHOWN_CHARACTERS]
    return repr(mask_secrets(shown))
