"""Conversations in the model's chat format: as text, as token ids, and with the loss mask.

A row is the chat template's rendering of the conversation, up to and including the last end token
`<|im_end|>`. Only what the assistant writes carries loss, end tokens included; what precedes it is
exactly the prompt of inference. Borders are known by construction (`qwen3ft.chat.skeleton`), never
searched for in anybody's text, and no token lies across one.

A turn with reasoning trains `<think>...</think>` and the answer; a last turn without reasoning has
an empty think block that is not trained. Thinking models have the opening tag in the prompt;
Instruct models omit reasoning, and most models omit it before the last question
(`probe_thinking`). Not covered: images, and turns that are not ChatML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qwen3ft.chat.conversation import TEXT_FIELDS, Conversation
from qwen3ft.chat.renderer import renderer_of
from qwen3ft.chat.skeleton import Skeleton, fill_slots
from qwen3ft.chat.words import TOKEN_BYTES, unpacked
from qwen3ft.errors import TokenizerError
from qwen3ft.text.spans import spans
from qwen3ft.units import MIB

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen3ft.records.data import QaRow

BLOCK_ROWS, BLOCK_CHARACTERS = 512, MIB
"""Rows, and characters of more than one, tokenised at a time: a token takes a hundred bytes."""

REMOVED = " … "
"""Replaces the removed middle of a reasoning."""

ChatRow = Mapping[str, Any]
"""A `QaRow`, or part of one: question and answer, or messages."""
TrainTurns = Literal["all", "last"]
Asked = str | ChatRow | Sequence[Mapping[str, Any]]
"""A question, a row whose last turn is to be generated, or the messages so far."""


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """Token ids of one row, and the half-open ranges [start, end) that carry loss, in order."""

    packed: bytes
    """Token ids as int32."""
    trained: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.packed) // TOKEN_BYTES

    @property
    def input_ids(self) -> list[int]:
        """Token ids as numbers."""
        return unpacked(self.packed)


class Segment(NamedTuple):
    """Part of a rendered row that carries loss, or does not."""

    text: str
    trained: bool


def generation_prompt(tokenizer: PreTrainedTokenizerBase, asked: Asked, thinking: bool) -> str:
    """Render the text after which the assistant writes.

    Args:
        tokenizer: Tokenizer with a chat template.
        asked: The conversation so far.
        thinking: Let the model think first; otherwise a template with thinking ends the prompt
            with an empty think block.

    Raises:
        TokenizerError: the template cannot be used.
    """
    skeleton, texts = renderer_of(tokenizer).prompt(tokenizer, _history(asked), thinking)
    return "".join(skeleton.unit_texts(texts))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, asked: Asked, thinking: bool, *, escape: bool = False
) -> list[int]:
    """Return the token ids of `generation_prompt`, exactly as in a training row.

    `escape` is as in `tokenize_rows`.

    Raises:
        TokenizerError: the template cannot be used.
    """
    return encoded_prompt(tokenizer, asked, thinking, escape=escape)[1]


def encoded_prompt(
    tokenizer: PreTrainedTokenizerBase, asked: Asked, thinking: bool, *, escape: bool = False
) -> tuple[str, list[int]]:
    """Return `generation_prompt` and `prompt_ids`, for one rendering.

    Raises:
        TokenizerError: the template cannot be used.
    """
    rendered = renderer_of(tokenizer).prompt(tokenizer, _history(asked), thinking)
    skeleton, texts = rendered
    [row] = _encode(tokenizer, [rendered], [frozenset()], escape)
    return "".join(skeleton.unit_texts(texts)), row.input_ids


def render_row(
    tokenizer: PreTrainedTokenizerBase, row: ChatRow, *, train_turns: TrainTurns = "all"
) -> list[Segment]:
    """Render a row as text; joined, the segments are the template's own rendering.

    A line break after the last end token is omitted.

    Raises:
        TokenizerError: as in `tokenize_rows`.
    """
    conversation = conversation_of(row)
    skeleton, texts = renderer_of(tokenizer).row(tokenizer, conversation)
    pieces = zip(skeleton.units, skeleton.unit_texts(texts), strict=True)
    trained = trained_turns(conversation, train_turns)
    marked = [(unit.turn in trained, text) for unit, text in pieces]
    return [
        Segment("".join(text for _, text in group), trained)
        for trained, group in groupby(marked, key=lambda piece: piece[0])
    ]


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ChatRow],
    *,
    train_turns: TrainTurns = "all",
    escape: bool = False,
) -> list[TokenizedRow]:
    """Return the token ids and trained ranges of each row, without truncation.

    Args:
        tokenizer: Tokenizer with a chat template.
        rows: Rows with stripped texts and at least one assistant message each.
        train_turns: Turns of the assistant that carry loss.
        escape: Tokenise `<|im_end|>`, `<think>` and the like in the data as plain text. Otherwise
            validation must reject rows that contain them.

    Raises:
        TokenizerError: the template's training rows do not continue its own prompts, or it changes
            the texts.
    """
    renderer = renderer_of(tokenizer)
    tokenized: list[TokenizedRow] = []
    whole = [conversation_of(row) for row in rows]
    for start, end in spans([_characters(one) for one in whole], BLOCK_ROWS, BLOCK_CHARACTERS):
        conversations = whole[start:end]
        rendered = [renderer.row(tokenizer, conversation) for conversation in conversations]
        trained = [trained_turns(conversation, train_turns) for conversation in conversations]
        tokenized += _encode(tokenizer, rendered, trained, escape)
    return tokenized


def tokens_over(tokenizer: PreTrainedTokenizerBase, row: QaRow, limit_tokens: int) -> int:
    """Return a number of tokens above the limit that a giant row surely has, by its bytes.

    Returns:
        0 if it may fit, or is small enough to be tokenised.

    Raises:
        TokenizerError: the template cannot be used.
    """
    texts = [row["question"], row["answer"]]
    if row["messages"]:
        texts = [message["content"] for message in conversation_of(row).messages]
    if sum(map(len, texts)) + len(row["reasoning"]) <= BLOCK_CHARACTERS:
        return 0  # soon tokenised, and then its length is known
    renderer = renderer_of(tokenizer)
    if renderer.thinking.writes:
        texts.append(row["reasoning"])
    fewest = renderer.encoder.bound.fewest_tokens(texts)
    return fewest if fewest > limit_tokens else 0


def shorten_reasoning(
    tokenizer: PreTrainedTokenizerBase, row: QaRow, max_tokens: int, *, escape: bool = False
) -> QaRow | None:
    """Remove the middle of the last reasoning so that the row fits into `max_tokens`.

    The reasoning is cut at token borders, with `REMOVED` in the gap. It is dropped if fewer than
    two of its tokens fit. The answer and the end token stay.

    Returns:
        The row, unchanged if it fits; None if it does not fit even without reasoning.

    Raises:
        TokenizerError: as in `tokenize_rows`.
    """

    def excess_tokens(candidate: QaRow) -> int:
        [tokenized] = tokenize_rows(tokenizer, [candidate], escape=escape)
        return len(tokenized) - max_tokens

    without = _with_reasoning(row, "")
    if tokens_over(tokenizer, row, max_tokens):
        if tokens_over(tokenizer, without, max_tokens):
            return None
    elif excess_tokens(row) <= 0:
        return row
    if excess_tokens(without) > 0:
        return None
    reasoning = renderer_of(tokenizer).encoder.bound.ends(row["reasoning"], max_tokens)
    borders = renderer_of(tokenizer).encoder.borders(reasoning)
    kept = min(len(borders) - 1, -excess_tokens(_with_reasoning(row, REMOVED.strip())))
    while kept >= 2:
        head_end, tail_start = borders[(kept + 1) // 2 - 1][1], borders[-(kept // 2)][0]
        head, tail = reasoning[:head_end], reasoning[max(head_end, tail_start) :]
        candidate = _with_reasoning(row, head.rstrip() + REMOVED + tail.lstrip())
        excess = excess_tokens(candidate)
        if excess <= 0:
            return candidate
        kept -= excess
    return without


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens and without truncation."""
    return list(map(unpacked, renderer_of(tokenizer).encoder.encode(texts))) if texts else []


def conversation_of(row: ChatRow) -> Conversation:
    """Return a row's messages up to the last of the assistant, and its tools.

    Raises:
        TokenizerError: it has no message of the assistant.
    """
    tools = row.get("tools") or ()
    messages = row.get("messages")
    if not messages:
        question = {"role": "user", "content": row["question"]}
        answer = {"role": "assistant", "content": row.get("answer") or ""}
        return Conversation((question, {**answer, "reasoning": row.get("reasoning")}), tools)
    end = len(messages)
    while end and messages[end - 1]["role"] != "assistant":
        end -= 1
    if not end:
        raise TokenizerError(
            f"A conversation of {len(messages)} messages has none of the assistant.",
            why="Only messages of the assistant are trained.",
            next_command="qwen3ft plan",
        )
    return Conversation(messages[:end], tools)


def trained_turns(conversation: Conversation, train_turns: TrainTurns) -> frozenset[int]:
    """Return the numbers of the assistant's turns that carry loss, from 0."""
    turns = [message for message in conversation.messages if message["role"] == "assistant"]
    first = len(turns) - 1 if train_turns == "last" else 0
    return frozenset(
        number for number, turn in enumerate(turns) if number >= first and turn.get("trained", True)
    )


def _characters(conversation: Conversation) -> int:
    """Return the length of what the messages say."""
    messages = conversation.messages
    return sum(len(message.get(name) or "") for message in messages for name in TEXT_FIELDS)


def _history(asked: Asked) -> Conversation:
    if isinstance(asked, str):
        return Conversation(({"role": "user", "content": asked},), ())
    if isinstance(asked, Mapping):
        return conversation_of(asked).history
    return Conversation(asked, ())


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    rendered: Sequence[tuple[Skeleton, list[str]]],
    trained_turns: Sequence[frozenset[int]],
    escape: bool,
) -> list[TokenizedRow]:
    """Return the token ids of filled skeletons, each with its own turns that carry loss."""
    encoder = renderer_of(tokenizer).encoder
    plans = [
        [
            fill_slots(unit.parts, texts) if ids is None else ids
            for unit, ids in zip(skeleton.units, skeleton.ids, strict=True)
        ]
        for skeleton, texts in rendered
    ]
    # A text that occurs twice is tokenised once.
    texts = list({piece: None for plan in plans for piece in plan if isinstance(piece, str)})
    encode = encoder.encode_escaped if escape else encoder.encode
    encoded = dict(zip(texts, encode(texts), strict=True))
    rows = []
    for (skeleton, _), plan, turns in zip(rendered, plans, trained_turns, strict=True):
        pieces = [encoded[piece] if isinstance(piece, str) else piece for piece in plan]
        trained: list[tuple[int, int]] = []
        end = 0
        for unit, piece in zip(skeleton.units, pieces, strict=True):
            start, end = end, end + len(piece) // TOKEN_BYTES
            if unit.turn not in turns:
                continue
            if trained and trained[-1][1] == start:
                start = trained.pop()[0]
            trained.append((start, end))
        rows.append(TokenizedRow(b"".join(pieces), trained))
    return rows


def _with_reasoning(row: QaRow, reasoning: str) -> QaRow:
    changed = row.copy()
    changed["reasoning"] = reasoning
    if row["messages"]:
        last = row["messages"][-1].copy()
        last["reasoning"] = reasoning
        changed["messages"] = [*row["messages"][:-1], last]
    return changed
