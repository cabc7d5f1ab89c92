"""Texts to token ids, many at a time, with or without tokens that text can spell.

Guarantees: nothing is added, cut or padded, whatever the tokenizer was used for before. Escaped,
no text becomes an added token: neither a control token such as `<|im_end|>` nor a tag such as
`<think>`, which tokenizers do not call special but read as one token all the same.
It covers tokenizers of the `tokenizers` library alone. It imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.templates import template_error

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

MAX_CACHED_CHARACTERS = 1_000_000
"""Bounds the cache of shared texts: some 40 MB of ids if every character were a token."""


class Encoder:
    """The tokenizer behind transformers' own, which spends most of its time on other things."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise template_error(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library.",
                "Its pieces cannot be tokenised apart without changing tokens.",
            )
        self._plain: Tokenizer = backend
        self._escaping: Tokenizer | None = None
        self._cache: dict[str, list[int]] = {}
        self._cached_characters = 0
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self.added_tokens = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        """Matches the tokens that are cut out of a text before anything else."""
        self._split = re.compile(f"({self.added_tokens.pattern})").split

    def split_tokens(self, text: str) -> list[str]:
        """The text cut beside added tokens: every second piece is one of them."""
        return self._split(text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        # transformers leaves the settings of its last call on the tokenizer they share.
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = False
        return [e.ids for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_escaped(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, none of them an added token."""
        ids = self.encode(texts)
        spelled = [place for place, text in enumerate(texts) if self.added_tokens.search(text)]
        if spelled:
            plain_text = [texts[place] for place in spelled]
            found = self._escaper().encode_batch_fast(plain_text, add_special_tokens=False)
            for place, encoding in zip(spelled, found, strict=True):
                ids[place] = encoding.ids
        return ids

    def encode_cached(self, text: str) -> list[int]:
        """Token ids of a text that many rows share, such as those of a template."""
        ids = self._cache.get(text)
        if ids is None:
            if self._cached_characters > MAX_CACHED_CHARACTERS:
                self._cache.clear()
                self._cached_characters = 0
            [ids] = self.encode([text])
            self._cached_characters += len(text)
            self._cache[text] = ids
        return ids

    def borders(self, text: str) -> list[tuple[int, int]]:
        """Where each token of the text begins and ends, in characters."""
        return list(self._plain.encode(text, add_special_tokens=False).offsets)

    def _escaper(self) -> Tokenizer:
        """A copy that reads all added tokens as text; made when first needed, for it is large."""
        if self._escaping is None:
            from tokenizers import Tokenizer

            content = json.loads(self._plain.to_str())
            for token in content["added_tokens"]:
                token["special"] = True  # the only ones that the switch below covers
            self._escaping = Tokenizer.from_str(json.dumps(content))
            self._escaping.encode_special_tokens = True
        return self._escaping
