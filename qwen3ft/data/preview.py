"""Tokenised rows as text, token by token, each marked as trained or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
# UTF-8 has 4 bytes at most. Waiting for more would be in vain if the text itself has U+FFFD.
_MOST_TOKENS_OF_A_CHARACTER = 4


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token, or the few tokens of one character."""

    text: str
    trained: bool


def show_tokens(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], trained: Sequence[int]
) -> list[ShownToken]:
    """Return the tokens of a row as text; `trained` has the edges of stretches that carry loss."""
    loss = [False] * len(input_ids)
    for start, end in zip(trained[::2], trained[1::2], strict=True):
        loss[start:end] = [True] * (end - start)
    shown: list[ShownToken] = []
    start = 0
    for position in range(len(input_ids)):
        held = position + 1 - start
        text = str(tokenizer.decode(list(input_ids[start : position + 1])))
        is_last = position + 1 == len(input_ids) or loss[position + 1] != loss[position]
        if text.endswith(_INCOMPLETE) and held < _MOST_TOKENS_OF_A_CHARACTER and not is_last:
            continue
        shown.append(ShownToken(text, loss[position]))
        start = position + 1
    return shown


def show_row(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[ShownToken]:
    """Return the tokens of a row of train.arrow or dev.arrow; see `show_tokens`."""
    return show_tokens(tokenizer, row["input_ids"], row["trained"])
