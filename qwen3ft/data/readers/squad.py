"""Rows of SQuAD's articles (rajpurkar.github.io/SQuAD-explorer): one for each question."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qwen3ft.data.readers.raw import RawRow, bad_row

_QUESTION_FIELDS = ("id", "question", "answers", "is_impossible")


def is_article(row: dict[str, Any]) -> bool:
    """Return whether an object is an article: paragraphs with questions."""
    paragraphs = row.get("paragraphs")
    first = paragraphs[0] if isinstance(paragraphs, list) and paragraphs else None
    return isinstance(first, dict) and "qas" in first


def questions_of(article: dict[str, Any], line: int, offset: int) -> Iterator[RawRow]:
    """Yield a row per question of an article, with its context and title."""
    about = {"title": article["title"]} if "title" in article else {}
    for paragraph in article["paragraphs"]:
        asked = paragraph.get("qas") if isinstance(paragraph, dict) else None
        around = {"context": paragraph["context"]} if asked and "context" in paragraph else {}
        for question in asked if isinstance(asked, list) else [None]:
            if isinstance(question, dict):
                kept = {name: question[name] for name in _QUESTION_FIELDS if name in question}
                yield RawRow(line, {**kept, **around, **about}, "", "", offset)
            else:
                yield bad_row(line, offset, "broken_squad", str(paragraph))
