"""Bound on the tokens of a text from its bytes alone, so that no giant text has to be tokenised.

A byte-level BPE keeps every byte of the text that its normaliser gives, and each of its tokens
stands for a bounded number of them. For other tokenizers there is no bound.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Normalised piece by piece: the normaliser takes some twenty bytes for each of a text.
_PIECE_CHARACTERS = 64 * 2**10
_BORDER_BYTES = 16
"""Most bytes by which two pieces are shorter if they are normalised together."""
_CHARACTERS_PER_BYTE = 4
"""Most characters of a text for each byte that normalising it leaves."""
_KEEPING = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")


class LengthBound:
    """Fewest tokens of texts by one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._normalizer = tokenizer.normalizer
        self.bytes_per_token = _bytes_per_token(tokenizer)
        """Most bytes that a token stands for; None if that is not known."""

    def fewest_tokens(self, texts: Sequence[str]) -> int:
        """Return a number of tokens that `texts` have at least, together; 0 if it is not known."""
        if self.bytes_per_token is None:
            return 0
        return sum(map(self._fewest_bytes, texts)) // self.bytes_per_token

    def ends(self, text: str, tokens: int) -> str:
        """Return `text`, of a giant one beginning and end alone, each of more than `tokens`."""
        if self.bytes_per_token is None:
            return text
        most = (tokens + 1) * self.bytes_per_token * _CHARACTERS_PER_BYTE
        return text if len(text) <= 2 * most else text[:most] + text[-most:]

    def _fewest_bytes(self, text: str) -> int:
        if self._normalizer is None or text.isascii():  # normalised as it is
            return len(text.encode())
        size = 0
        for start in range(0, len(text), _PIECE_CHARACTERS):
            piece = self._normalizer.normalize_str(text[start : start + _PIECE_CHARACTERS])
            size += max(0, len(piece.encode()) - _BORDER_BYTES)
        return size


def _bytes_per_token(tokenizer: Tokenizer) -> int | None:
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    model: Any = tokenizer.model
    added = tokenizer.get_added_tokens_decoder().values()
    normalizers = {step["type"] for step in _steps(tokenizer.normalizer, "normalizers")}
    splits = list(_steps(tokenizer.pre_tokenizer, "pretokenizers"))
    keeps_text = all(
        step["type"] == "ByteLevel" or step.get("behavior") in _KEEPING for step in splits
    )
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    is_known = (
        isinstance(model, BPE)
        and normalizers <= {"NFC"}
        and keeps_text
        and any(step["type"] == "ByteLevel" for step in splits)
        and vocabulary.keys() >= {*ByteLevel.alphabet()}  # or bytes would be dropped
        and not any(token.lstrip or token.rstrip for token in added)  # they take white space along
    )
    if not is_known:
        return None
    # A character of a token in the vocabulary is a byte of text.
    return max(*map(len, vocabulary), *(len(token.content.encode()) for token in added), 1)


def _steps(part: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield the steps that a part of a tokenizer consists of; None has none."""
    if part is None:
        return
    waiting = [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop()
        if name in step:
            waiting += step[name]
        else:
            yield step
