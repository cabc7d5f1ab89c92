"""Tokenised rows as text, token by token, each marked as trained or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen3ft.logs import MASK, mask_secrets, secret_spans

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
    """Return the tokens of a row as text; `trained` has the edges of stretches that carry loss.

    A key is shown as ***, whichever tokens it is made of.
    """
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
    return _masked(shown)


def _masked(tokens: list[ShownToken]) -> list[ShownToken]:
    """Return the tokens, those of a key replaced by *** in the first of them."""
    text = "".join(token.text for token in tokens)
    if mask_secrets(text) == text:
        return tokens
    spans = iter(secret_spans(text))
    span, start, shown = next(spans, None), 0, []
    for token in tokens:
        end = start + len(token.text)
        while span is not None and span[1] <= start:
            span = next(spans, None)
        if span is None or end <= span[0]:
            shown.append(token)
        elif start <= span[0]:
            shown.append(ShownToken(MASK, token.trained))
        start = end
    return shown


def show_row(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[ShownToken]:
    """Return the tokens of a row of train.arrow or dev.arrow; see `show_tokens`."""
    return show_tokens(tokenizer, row["input_ids"], row["trained"])
