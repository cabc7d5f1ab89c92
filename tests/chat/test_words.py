"""Tests of encoding by words: the same ids as of whole texts, whatever is in them."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from qwen3ft.chat import words as words_module
from qwen3ft.chat.tokenizer import Encoder, load_tokenizer
from qwen3ft.chat.words import WordEncoder, is_separable, unpacked
from qwen3ft.embedded import DATA_DIR, MODEL_DIR

PIECES = (
    *("a", "the", "Ünïcödé", "e\u0301", "\u0308", "don't", "'s", "'LL", "I'Ve", "7", "1,250", "½"),
    *(" ", " ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u2028", "\u0085", "\x1c", "\x0b"),
    *(
        "\u3000",
        "中文",
        "，",
        "。",
        "🙂",
        "👩‍🚀",
        "<",
        "<think>",
        "</think>",
        "<|im_end|>",
        "<|im_",
    ),
    *("\0", "#", "....", "$5.20/h", "_x_", "-", "“q”", "ａ１", "\ufeff", "\u200b", "가", "ไทย"),
)


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer(MODEL_DIR))


def random_texts(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices(PIECES, k=chance.randrange(24))) for _ in range(count)]


def whole(texts: list[str]) -> list[list[int]]:
    fresh = tokenizer()
    return [fresh.encode(text, add_special_tokens=False).ids for text in texts]


def test_ids_are_those_of_the_whole_text(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "MOST_WORDS", 500)  # the caches are emptied on the way
    texts = random_texts(6000, 1)
    texts += (DATA_DIR / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts += ["", " ", "  ", "x" * 70_000, "word " * 3000, " " * 500 + "x", "\t" * 300 + "1"]
    found = [
        ids
        for start in range(0, len(texts), 50)
        for ids in encoder.encode(texts[start : start + 50])
    ]
    assert list(map(unpacked, found)) == whole(texts)


@pytest.mark.parametrize("blank", [chr(code) for code in range(0x10000) if chr(code).isspace()])
def test_every_white_space_is_split_as_the_tokenizer_does(encoder: Encoder, blank: str) -> None:
    texts = [
        f"a{blank} b",
        f"a {blank}b",
        f"a{blank}b",
        f"{blank} 1",
        f"a {blank}",
        f"#{blank}\n{blank} x",
    ]
    assert list(map(unpacked, encoder.encode(texts))) == whole(texts)


def test_ascii_characters_are_classed_as_by_the_tokenizer(encoder: Encoder) -> None:
    letters = [chr(code) for code in range(128)]
    texts = [
        f"{one}{other}{after}" for one in letters for other in letters for after in ("", "a1\n")
    ]
    assert list(map(unpacked, encoder.encode(texts))) == whole(texts)


def test_only_tokenizers_that_split_before_spaces_are_separable() -> None:
    assert is_separable(tokenizer())
    changes = {
        "normalizer": normalizers.NFKC(),
        "pre_tokenizer": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    for name, value in changes.items():
        other = tokenizer()
        setattr(other, name, value)
        assert not is_separable(other), name
    other = tokenizer()
    other.model.dropout = 0.1
    assert not is_separable(other)
    for token in (AddedToken("two words"), AddedToken("<x>", lstrip=True)):
        other = tokenizer()
        other.add_tokens([token])
        assert not is_separable(other)


def test_texts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fresh = tokenizer()

    def encode(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return [fresh.encode(text, add_special_tokens=False).ids for text in texts]

    by_words = WordEncoder(encode, Encoder(load_tokenizer(MODEL_DIR)).added_tokens)
    first = by_words.encode(["one two one two", "two one"])
    assert seen == sorted(set(seen), key=seen.index)
    assert by_words.encode(["one two one two", "two one"]) == first
    assert set(seen) == {"one", " two", " one", "two"}
