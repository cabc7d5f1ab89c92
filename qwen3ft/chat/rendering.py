"""Conversations in the model's own chat format: as text, as token ids, and what is trained.

Guarantees: a row is what the tokenizer's chat template makes of the conversation, up to and with
the last end token `<|im_end|>`. Loss is on what the assistant writes alone, its end tokens
included; what comes before is exactly the prompt that inference starts from. All this holds by
construction (see `qwen3ft.chat.skeleton`): no border is searched for in anybody's text, and no
token lies across one.

Thinking: a turn with reasoning trains `<think>...</think>` and the answer; a last turn without has
an empty think block, which is not trained. A template that prefills `<think>` (the Thinking models)
has the opening tag in the prompt; one that knows no thinking (the Instruct models) leaves reasoning
out, in training and inference alike; most leave it out of turns before the last question (see
`probe_thinking`).

Escaped, nothing that somebody wrote becomes a control token or a tag. Not escaped, rows that spell
them have to be kept out by validation. It does not cover images, or turns that are not ChatML.
It imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qwen3ft.chat.renderer import is_trained, renderer_of
from qwen3ft.chat.skeleton import Conversation, Skeleton, fill
from qwen3ft.chat.templates import END_TOKEN, ThinkingSupport, probe_thinking
from qwen3ft.chat.tokenizer import configure_tokenizer, load_tokenizer
from qwen3ft.errors import TokenizerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen3ft.records.data import QaRow

__all__ = [
    "END_TOKEN",
    "Segment",
    "ThinkingSupport",
    "TokenizedRow",
    "configure_tokenizer",
    "encode_texts",
    "generation_prompt",
    "load_tokenizer",
    "probe_thinking",
    "prompt_ids",
    "render_row",
    "shorten_reasoning",
    "tokenize_rows",
]


BLOCK_ROWS = 512
"""Rows tokenised at a time; bounds the text held beside the ids."""

REMOVED = " … "
"""Stands where the middle of a reasoning was."""

Row = Mapping[str, Any]
"""A `QaRow`, or as much of one as there is: question and answer, or messages."""
TrainTurns = Literal["all", "last"]
Asked = str | Row | Sequence[Mapping[str, Any]]
"""A question, a row (its last turn is to be written), or the messages so far."""


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """Token ids of one row, and the half-open ranges of them that carry loss, in order."""

    input_ids: list[int]
    trained: list[tuple[int, int]]


class Segment(NamedTuple):
    """A stretch of a rendered row, and whether it is trained."""

    text: str
    trained: bool


def generation_prompt(tokenizer: PreTrainedTokenizerBase, asked: Asked, thinking: bool) -> str:
    """The text after which the assistant writes: the one border of training and inference.

    Args:
        tokenizer: With a chat template.
        asked: What was said so far.
        thinking: Whether the model is to think first; if not, a template with thinking closes an
            empty think block here.

    Raises:
        TokenizerError: the template cannot be used.
    """
    skeleton, texts = renderer_of(tokenizer).prompt(tokenizer, _history(asked), thinking)
    return "".join(skeleton.unit_texts(texts))


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, asked: Asked, thinking: bool, *, escape: bool = False
) -> list[int]:
    """The token ids of `generation_prompt`, exactly as in a training row.

    Args:
        tokenizer: With a chat template.
        asked: What was said so far.
        thinking: Whether the model is to think first.
        escape: As in `tokenize_rows`.

    Raises:
        TokenizerError: as `generation_prompt`.
    """
    rendered = renderer_of(tokenizer).prompt(tokenizer, _history(asked), thinking)
    return _encode(tokenizer, [rendered], "all", escape)[0].input_ids


def render_row(
    tokenizer: PreTrainedTokenizerBase, row: Row, *, train_turns: TrainTurns = "all"
) -> list[Segment]:
    """A row as text; joined, the segments are the template's own rendering.

    What the template writes after the last end token (a line break) is left out.

    Raises:
        TokenizerError: as `tokenize_rows`.
    """
    skeleton, texts = renderer_of(tokenizer).row(tokenizer, conversation_of(row))
    pieces = zip(skeleton.units, skeleton.unit_texts(texts), strict=True)
    marked = [(is_trained(unit.turn, skeleton.turns, train_turns), text) for unit, text in pieces]
    return [
        Segment("".join(text for _, text in group), trained)
        for trained, group in groupby(marked, key=lambda piece: piece[0])
    ]


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    train_turns: TrainTurns = "all",
    escape: bool = False,
) -> list[TokenizedRow]:
    """Token ids and trained ranges of each row; nothing is cut.

    Args:
        tokenizer: With a chat template.
        rows: Texts stripped; at least one assistant message in each.
        train_turns: Whether every turn of the assistant carries loss, or the last alone.
        escape: Read `<|im_end|>`, `<think>` and the like as plain text where somebody wrote them.

    Raises:
        TokenizerError: the template would train something else than inference asks for, or
            changes what was written.
    """
    renderer = renderer_of(tokenizer)
    tokenized: list[TokenizedRow] = []
    for start in range(0, len(rows), BLOCK_ROWS):
        block = rows[start : start + BLOCK_ROWS]
        rendered = [renderer.row(tokenizer, conversation_of(row)) for row in block]
        tokenized += _encode(tokenizer, rendered, train_turns, escape)
    return tokenized


def shorten_reasoning(
    tokenizer: PreTrainedTokenizerBase, row: QaRow, max_tokens: int, *, escape: bool = False
) -> QaRow | None:
    """The row with as much of the middle of its last reasoning removed as makes it fit.

    The reasoning is cut at borders of tokens, and `REMOVED` stands for what is gone. Where not
    even two of its tokens fit, it is left out, and the row is one without thinking. The answer and
    the end token are never touched; a row that fits comes back as it is.

    Args:
        tokenizer: With a chat template.
        row: As for `tokenize_rows`.
        max_tokens: Longest row allowed.
        escape: As in `tokenize_rows`.

    Returns:
        None if the row does not even fit without reasoning.

    Raises:
        TokenizerError: as `tokenize_rows`.
    """

    def excess_tokens(candidate: QaRow) -> int:
        [tokenized] = tokenize_rows(tokenizer, [candidate], escape=escape)
        return len(tokenized.input_ids) - max_tokens

    if excess_tokens(row) <= 0:
        return row
    without = _with_reasoning(row, "")
    if excess_tokens(without) > 0:
        return None
    reasoning = row["reasoning"]
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
    """Token ids of each text, with nothing added and nothing cut."""
    return renderer_of(tokenizer).encoder.encode(texts) if texts else []


def conversation_of(row: Row) -> Conversation:
    """The row's messages, up to the last of the assistant, and its tools.

    Raises:
        TokenizerError: the assistant says nothing in it.
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
            why="There is nothing to train in it.",
            next_command="qwen3ft plan",
        )
    return Conversation(messages[:end], tools)


def _history(asked: Asked) -> Conversation:
    if isinstance(asked, str):
        return Conversation(({"role": "user", "content": asked},), ())
    if isinstance(asked, Mapping):
        return conversation_of(asked).history
    return Conversation(asked, ())


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    rendered: Sequence[tuple[Skeleton, list[str]]],
    train_turns: TrainTurns,
    escape: bool,
) -> list[TokenizedRow]:
    """Token ids of filled skeletons; a text that occurs twice is tokenised once."""
    encoder = renderer_of(tokenizer).encoder
    places: dict[str, int] = {}
    plans: list[list[list[int] | int]] = []
    for skeleton, texts in rendered:
        plans.append(
            [
                places.setdefault(fill(unit.parts, texts), len(places)) if ids is None else ids
                for unit, ids in zip(skeleton.units, skeleton.ids, strict=True)
            ]
        )
    encode = encoder.encode_escaped if escape else encoder.encode
    encoded = encode(list(places))
    rows = []
    for (skeleton, _), plan in zip(rendered, plans, strict=True):
        ids: list[int] = []
        trained: list[tuple[int, int]] = []
        for unit, piece in zip(skeleton.units, plan, strict=True):
            start = len(ids)
            ids += encoded[piece] if isinstance(piece, int) else piece
            if not is_trained(unit.turn, skeleton.turns, train_turns):
                continue
            if trained and trained[-1][1] == start:
                start = trained.pop()[0]
            trained.append((start, len(ids)))
        rows.append(TokenizedRow(ids, trained))
    return rows


def _with_reasoning(row: QaRow, reasoning: str) -> QaRow:
    changed = row.copy()
    changed["reasoning"] = reasoning
    if row["messages"]:
        last = row["messages"][-1].copy()
        last["reasoning"] = reasoning
        changed["messages"] = [*row["messages"][:-1], last]
    return changed
