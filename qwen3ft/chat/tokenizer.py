"""A tokenizer that training can use: turn markers, a chat template, a padding token.

Guarantees: padding is never the end token, and what is missing is added where it can be told, and
said in the log. A chat template that is not known by its hash is used, with a warning.
It does not cover tokenizers of other models than Qwen's.
It imports transformers only to load a tokenizer, and never torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.templates import END_TOKEN, identify_template, template_error
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import TokenizerError
from qwen3ft.logs import get_logger

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

START_TOKEN, PAD_TOKEN = "<|im_start|>", "<|endoftext|>"


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder` (or a cached hub name), ready for use: see `configure_tokenizer`.

    Raises:
        TokenizerError: it cannot be loaded or configured.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(
            f"The tokenizer in {folder} cannot be loaded: {error}",
            why="tokenizer.json or tokenizer_config.json is missing or damaged.",
            next_command=f"ls -l {folder}",
            folder=str(folder),
        ) from error
    configure_tokenizer(tokenizer)
    return tokenizer


def configure_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give `tokenizer` what training needs where it can be told: a chat template, a padding token.

    Raises:
        TokenizerError: it does not know the turn markers of Qwen, or has no token to pad with.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (START_TOKEN, END_TOKEN) if token not in vocabulary]
    if missing:
        raise template_error(
            f"The tokenizer does not have {' and '.join(missing)} as single tokens.",
            "Turns are marked by them; this is no Qwen chat tokenizer.",
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = (MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")
        get_logger("data").warning(
            "The tokenizer has no chat template; the embedded model's, which is Qwen3's, is used."
        )
    info = identify_template(tokenizer)
    if not info.name:
        get_logger("data").warning(
            "The chat template (sha256 %s) is none of the known ones; it is used as it behaves.",
            info.sha256,
        )
    if tokenizer.pad_token_id in (None, vocabulary[END_TOKEN]):
        if PAD_TOKEN not in vocabulary:
            raise template_error(
                f"The tokenizer has no padding token besides {END_TOKEN}, and no {PAD_TOKEN}.",
                "Padding with the end token would teach the model never to stop.",
            )
        tokenizer.pad_token = PAD_TOKEN


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
