"""Encoding by words: what a text repeats is encoded once.

Qwen's pre-tokenizer always splits before a space that follows something else than white space: of
its alternatives one matches such a space only as its first character, and none goes on across it.
NFC composes nothing across it either, and no added token has white space in it. So the ids of a
text are those of its words, each with the space before it, and `is_separable` says whether all that
holds of a tokenizer. A word of ASCII characters is split further, by the same pattern.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encode = Callable[[list[str]], list[list[int]]]
"""Returns the ids of each text."""

MOST_WORDS, MOST_WORD_CHARACTERS = 2**17, 64
"""Limits of what is remembered; words and their pieces take about 30 MB each."""

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = [
    {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
]
# The same for ASCII characters; Python's \s has four more of them than Unicode's white space.
_BLANK = r"\t\n\v\f\r "
_ASCII_PIECES = re.compile(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]"
    rf"| ?[^{_BLANK}A-Za-z0-9]+[\r\n]*|[{_BLANK}]*[\r\n]+|[{_BLANK}]+(?![^{_BLANK}])|[{_BLANK}]+"
)
_BLANK_BEFORE_SPACE = re.compile(r"\s ")
_SPACE_BEHIND_WORD = re.compile(r"(?<=\S) ")

TOKEN_BYTES = 4
"""Size of a token id."""

# Stands before the first word of a text, which has no space before it.
_START = "\0"


def is_separable(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer encodes a text word by word."""
    model: Any = tokenizer.model
    normalizer, splitter = _state(tokenizer.normalizer), _state(tokenizer.pre_tokenizer)
    pieces = splitter.get("pretokenizers", ())
    return (
        type(model).__name__ == "BPE"
        and not model.dropout
        and normalizer in ({}, {"type": "NFC"})
        and [{k: v for k, v in piece.items() if k != "trim_offsets"} for piece in pieces]
        == _PRE_TOKENIZERS
        and not any(
            token.lstrip or token.rstrip or token.single_word or re.search(r"\s", token.content)
            for token in tokenizer.get_added_tokens_decoder().values()
        )
    )


def _state(component: Any) -> dict[str, Any]:
    state = json.loads(component.__getstate__()) if component is not None else {}
    return state if isinstance(state, dict) else {}


def packed(ids: Iterable[int]) -> bytes:
    """Return token ids as int32."""
    return array("i", ids).tobytes()


def unpacked(ids: bytes) -> list[int]:
    """Return the token ids of `packed`."""
    return array("i", ids).tolist()


class WordEncoder:
    """Encodes texts word by word.

    Args:
        encode: Encodes texts by a tokenizer that `is_separable`.
        added_tokens: Pattern of its added tokens.
    """

    def __init__(self, encode: Encode, added_tokens: re.Pattern[str]) -> None:
        self._encode = encode
        self._has_added_token = added_tokens.search
        self._words: dict[str, bytes] = {}
        self._pieces: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text, `packed`."""
        split, words = [_split(text) for text in texts], self._words
        missing = {word for text in split for word in text if word not in words}
        if missing:
            if len(words) + len(missing) > MOST_WORDS:
                words.clear()
                missing = {word for text in split for word in text}
            words.update(self._encode_words(missing))
        get = words.__getitem__
        encoded = [b"".join(map(get, text)) for text in split]
        for word in missing:
            if len(word) > MOST_WORD_CHARACTERS:
                del words[word]
        return encoded

    def _encode_words(self, words: Iterable[str]) -> dict[str, bytes]:
        split: dict[str, list[str]] = {}
        for word in words:
            text = word[1:] if word.startswith(_START) else f" {word}"
            simple = text.isascii() and not self._has_added_token(text)
            split[word] = _ASCII_PIECES.findall(text) if simple else [text]
        pieces = self._pieces
        missing = {piece for text in split.values() for piece in text if piece not in pieces}
        if len(pieces) + len(missing) > MOST_WORDS:
            pieces.clear()
            missing = {piece for text in split.values() for piece in text}
        ordered = list(missing)
        pieces.update(zip(ordered, map(packed, self._encode(ordered)), strict=True))
        encoded = {word: b"".join(map(pieces.__getitem__, text)) for word, text in split.items()}
        for piece in ordered:
            if len(piece) > MOST_WORD_CHARACTERS:
                del pieces[piece]
        return encoded


def _split(text: str) -> list[str]:
    """Return the words of a text without the spaces before them, the first one behind `_START`."""
    if _START in text:
        return [_START + text]
    if _BLANK_BEFORE_SPACE.search(text):
        return _SPACE_BEHIND_WORD.split(_START + text)
    return (_START + text).split(" ")
