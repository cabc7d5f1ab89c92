"""Text from outside: shown without steering a terminal, compared in time that grows with it."""

from __future__ import annotations

import unicodedata

import pytest

from qwen3ft.data.splits import question_key
from qwen3ft.data.text_features import features
from qwen3ft.plain_text import escaped, escaped_line, is_plain, normalized, without_steering

STEERING = {
    "\x1b[2J": "\\x1b[2J",
    "\x1b]0;title\x07": "\\x1b]0;title\\x07",
    "\x9b31m": "\\x9b31m",
    "a\rb": "a\\rb",
    "a\x08b": "a\\x08b",
    "\x7f": "\\x7f",
    "\u202egpj.exe": "\\u202egpj.exe",
    "\u2066a\u2069": "\\u2066a\\u2069",
    "\u200f\u061c": "\\u200f\\u061c",
    "\u2028": "\\u2028",
    "\udcff.jsonl": "\\udcff.jsonl",
    "a\0b": "a\\x00b",
}


@pytest.mark.parametrize(("text", "expected"), STEERING.items(), ids=list(STEERING.values()))
def test_what_steers_a_terminal_is_escaped(text: str, expected: str) -> None:
    """Escape sequences, moves of the cursor, direction marks, halves of characters."""
    assert escaped(f"é\t{text}\n") == f"é\t{expected}\n"
    assert escaped_line(f"é\t{text}\n") == f"é\\t{expected}\\n"
    assert not is_plain(text)
    assert is_plain(expected)
    assert is_plain(without_steering(text))


@pytest.mark.parametrize("text", ["你好，“世界”\u3000é😀👨‍👩‍👧", "مرحبا שלום", "می‌خواهم", "a\\x1b"])
def test_letters_of_all_languages_are_shown_as_they_are(text: str) -> None:
    """Emoji of several characters, and joiners that Persian needs, stay whole."""
    assert escaped_line(text) == text


@pytest.mark.parametrize(
    "text",
    ["a" + "\u0301\u0323" * 200_000, "한" + "\u0323" * 9 + "\u0301" * 400_000, "é\u0315" * 100_000],
)
@pytest.mark.timeout(120)
def test_many_marks_on_a_character_do_not_take_long(text: str) -> None:
    """To sort 400,000 of them would take hours."""
    assert len(normalized("NFC", text)) <= len(text)
    assert question_key(text) == question_key(f"  {text} ?")
    assert features(f"{text}\0{text}").text


def test_usual_text_is_normalised_as_by_unicode() -> None:
    """Up to 30 marks, each form."""
    for text in ("e\u0301", "ﬁ", "한글", "a" + "\u0323\u0301" * 15, "Việt Nam"):
        assert normalized("NFC", text) == unicodedata.normalize("NFC", text)
        assert normalized("NFKC", text) == unicodedata.normalize("NFKC", text)


@pytest.mark.parametrize("separators", ["(", "/", "/ (-", " \t("])
@pytest.mark.timeout(120)
def test_separators_in_a_row_do_not_take_long(separators: str) -> None:
    """Before a name each of them could be where the search for it begins."""
    found = features(f"see{separators * 200_000}Paris and /(Rome or the (Alps)\0yes")
    assert found.names == ("paris", "rome", "alps")
