"""Loading a Qwen tokenizer for training, and fast encoding of texts.

Training needs turn markers, a chat template, and a padding token that is not the end token. A
missing template or padding token is added; an unknown template is used with a warning. The declared
end is the one that is trained, which that of a base model is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.chat.length_bound import LengthBound
from qwen3ft.chat.templates import (
    END_TOKEN,
    MOST_REASON_CHARACTERS,
    identify_template,
    template_error,
)
from qwen3ft.chat.words import WordEncoder, is_separable, packed
from qwen3ft.disk.files import read_foreign_json
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import TokenizerError
from qwen3ft.logs import get_logger
from qwen3ft.text.commands import shell_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

START_TOKEN, PAD_TOKEN = "<|im_start|>", "<|endoftext|>"
_VOCABULARIES = ("tokenizer.json", "vocab.json")


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `folder` (or of a cached hub name) and configure it for training.

    Raises:
        TokenizerError: it cannot be loaded or configured.
    """
    from transformers import AutoTokenizer, Qwen3Config

    try:
        # transformers makes an empty tokenizer of a folder without one.
        if Path(folder).is_dir() and not any(Path(folder, name).exists() for name in _VOCABULARIES):
            raise FileNotFoundError(f"there is neither {' nor '.join(_VOCABULARIES)}")
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            config=Qwen3Config(),  # otherwise it reads config.json, of which it needs the type only
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # tokenizers raises plain exceptions, transformers all kinds
        raise TokenizerError(
            f"The tokenizer in {folder} cannot be loaded: {type(error).__name__}: "
            f"{str(error)[:MOST_REASON_CHARACTERS]!a}",
            why="tokenizer.json or tokenizer_config.json is missing or damaged.",
            next_command=shell_line("ls", "-l", folder),
            folder=str(folder),
        ) from error
    configure_tokenizer(tokenizer)
    return tokenizer


def configure_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Declare the trained end token, and add a chat template and a padding token if missing.

    Raises:
        TokenizerError: it lacks Qwen's turn markers, or any token to pad with.
    """
    vocabulary = tokenizer.get_vocab()
    # Among the added ones, or a text with it would be split into other tokens.
    whole = tokenizer.get_added_vocab()
    missing = [token for token in (START_TOKEN, END_TOKEN) if token not in whole]
    if missing:
        raise template_error(
            f"The tokenizer does not have {' and '.join(missing)} as single tokens.",
            "They mark the turns of a chat; this is not a Qwen chat tokenizer.",
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = (MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")
        get_logger("data").warning(
            "The tokenizer has no chat template; using the embedded model's, which is Qwen3's."
        )
    info = identify_template(tokenizer)
    if not info.name:
        get_logger("data").warning(
            "The chat template (sha256 %s) is unknown; it is probed and used as it is.", info.sha256
        )
    if tokenizer.eos_token != END_TOKEN:
        # Base models end texts with <|endoftext|>; what is trained here ends every turn with this
        # token, and whatever loads the tokenizer later has to stop there.
        tokenizer.eos_token = END_TOKEN
    if tokenizer.pad_token_id in (None, vocabulary[END_TOKEN]):
        if PAD_TOKEN not in vocabulary:
            raise template_error(
                f"The tokenizer has no padding token besides {END_TOKEN}, and no {PAD_TOKEN}.",
                "Padding with the end token would teach the model never to stop.",
            )
        tokenizer.pad_token = PAD_TOKEN


def declared_end(folder: Path) -> str | None:
    """Return the end token that the settings of the tokenizer in `folder` name, if any."""
    try:
        settings = read_foreign_json(folder / "tokenizer_config.json")
    except ValueError:
        return None
    named = settings.get("eos_token") if isinstance(settings, dict) else None
    content = named.get("content") if isinstance(named, dict) else named
    return content if isinstance(content, str) else None


MAX_CACHED_CHARACTERS = 1_000_000
"""Limit of the cache of shared texts: 4 MB of ids if every character were a token."""


class Encoder:
    """Direct use of the Rust tokenizer: transformers' wrapper takes most of the time of a call."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise template_error(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library.",
                "Pieces of a text cannot be tokenised separately without changing tokens.",
            )
        self._plain: Tokenizer = backend
        self._escaping: Tokenizer | None = None
        self._cache: dict[str, bytes] = {}
        self._cached_characters = 0
        # Longest first, because one token may be the beginning of another.
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self.added_tokens = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        """Pattern of the added tokens, which a tokenizer cuts out of a text first."""
        self._split = re.compile(f"({self.added_tokens.pattern})").split
        self._by_words: WordEncoder | None = None
        if is_separable(backend):
            self._by_words = WordEncoder(self._encode_whole, self.added_tokens)

    @cached_property
    def bound(self) -> LengthBound:
        """Bound on the tokens of a text; made on first use, as it reads the whole vocabulary."""
        return LengthBound(self._plain)

    def split_tokens(self, text: str) -> list[str]:
        """Split the text at added tokens; every second piece is one of them."""
        return self._split(text)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the token ids of each text, `packed`."""
        if self._by_words is not None:
            return self._by_words.encode(texts)
        return list(map(packed, self._encode_whole(list(texts))))

    def _encode_whole(self, texts: list[str]) -> list[list[int]]:
        # The Rust tokenizer is shared with transformers, whose last call left its settings there.
        self._plain.no_padding()
        self._plain.no_truncation()
        self._plain.encode_special_tokens = False
        return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_escaped(self, texts: Sequence[str]) -> list[bytes]:
        """Return the token ids of each text, `packed`, with added tokens spelled as plain text."""
        ids = self.encode(texts)
        spelled = [place for place, text in enumerate(texts) if self.added_tokens.search(text)]
        if spelled:
            plain_text = [texts[place] for place in spelled]
            found = self._escaper().encode_batch_fast(plain_text, add_special_tokens=False)
            for place, encoding in zip(spelled, found, strict=True):
                ids[place] = packed(encoding.ids)
        return ids

    def encode_cached(self, text: str) -> bytes:
        """Return the `packed` token ids of a text that many rows share, such as template text."""
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
        """Return (start, end) of each token, in characters."""
        return list(self._plain.encode(text, add_special_tokens=False).offsets)

    def _escaper(self) -> Tokenizer:
        """Return a copy that reads added tokens as text; made on first use, since it is large."""
        if self._escaping is None:
            from tokenizers import Tokenizer

            content = json.loads(self._plain.to_str())
            for token in content["added_tokens"]:
                token["special"] = True  # the switch below covers special ones only
            self._escaping = Tokenizer.from_str(json.dumps(content))
            self._escaping.encode_special_tokens = True
        return self._escaping
