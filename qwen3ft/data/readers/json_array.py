"""SQuAD's nesting (articles of paragraphs of questions) as one row per question.

The layout is that of https://rajpurkar.github.io/SQuAD-explorer/ (versions 1.1 and 2.0), which
DRCD, CMRC 2018 and others follow: {"title", "paragraphs": [{"context", "qas": [{"id", "question",
"answers": [{"text", "answer_start"}], "is_impossible"}]}]}. What an article lacks, a row lacks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from qwen3ft.data.readers.json_window import size_bytes
from qwen3ft.data.readers.raw import RawRow, bad_row

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)
_KEPT = ("id", "question", "answers", "is_impossible")
_QUESTION_DEPTH = 5
"""Brackets open at a question: article, paragraphs, paragraph, qas, question."""
_LISTS = {2: '"paragraphs"', 4: '"qas"'}


def is_squad(value: dict[str, Any]) -> bool:
    """Whether `value` is an article."""
    paragraphs = value.get("paragraphs")
    return (
        isinstance(paragraphs, list)
        and bool(paragraphs)
        and isinstance(paragraphs[0], dict)
        and "qas" in paragraphs[0]
    )


def squad_rows(article: dict[str, Any], text: str, line: int, offset: int) -> Iterator[RawRow]:
    """One row per question: values id, question, answers, is_impossible, context, title.

    Args:
        article: The article, decoded from `text`.
        text: Its JSON.
        line: Where `text` starts in the file.
        offset: Byte where `text` starts in the file.
    """
    questions = list(_questions(article))
    places = _places(text, line, offset)
    if len(places) != len(questions):  # some question is no object, or a field stands there twice
        places = [(line, offset)] * len(questions)
    for (number, start), values in zip(places, questions, strict=True):
        if values is None:
            yield bad_row(number, start, "broken_squad", text)
        else:
            yield RawRow(number, values, offset=start)


def _questions(article: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """The values of each question; None for a paragraph or question that is not laid out so."""
    about = {"title": article["title"]} if "title" in article else {}
    for paragraph in article["paragraphs"]:
        asked = paragraph.get("qas") if isinstance(paragraph, dict) else None
        if not isinstance(asked, list):
            yield None
            continue
        around = {"context": paragraph["context"]} if "context" in paragraph else {}
        for question in asked:
            if isinstance(question, dict):
                kept = {name: question[name] for name in _KEPT if name in question}
                yield {**kept, **around, **about}
            else:
                yield None


def _places(text: str, line: int, offset: int) -> list[tuple[int, int]]:
    """(line, byte) of each question's opening brace."""
    places = []
    depth, at, last = 0, 0, ""
    inside: dict[int, bool] = {}
    for match in _TOKEN.finditer(text):
        sign = match[0]
        if sign in ("{", "["):
            depth += 1
            if sign == "[" and depth in _LISTS:
                inside[depth] = last == _LISTS[depth]
            elif sign == "{" and depth == _QUESTION_DEPTH and inside.get(2) and inside.get(4):
                passed, at = text[at : match.start()], match.start()
                line, offset = line + passed.count("\n"), offset + size_bytes(passed)
                places.append((line, offset))
        elif sign in ("}", "]"):
            inside[depth] = False
            depth -= 1
        else:
            last = sign
    return places
