"""Rows in every documented layout are trained as a reference by transformers has them."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.golden_conversations import CONVERSATIONS

from benchmarks.layouts import check as checking
from benchmarks.layouts import talks as t
from benchmarks.layouts.check import LAYOUTS, check, unseen
from benchmarks.layouts.families import families
from benchmarks.layouts.layout import Layout, pair, question_of
from benchmarks.layouts.reference import reference_tokens
from benchmarks.layouts.talks import Talk
from qwen3ft.chat.rendering import tokenize_rows
from qwen3ft.data.columns import PARTS
from qwen3ft.data.rows import RowCounts

Tokenizers = dict[str, tuple[Any, Any]]
ROWS = 5
"""Rows of each layout here; `python -m benchmarks.layouts` checks 40."""
FOLDER = Path(checking.__file__).parent


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return families()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_is_trained_as_its_reference_is_or_refused(
    tmp_path: Path, tokenizers: Tokenizers, layout: Layout
) -> None:
    """Token ids and loss mask, three families and a base model; and what is not used is named."""
    verdict = check(layout, ROWS, tmp_path, tokenizers)
    assert not verdict.differences, "\n".join(verdict.differences[:2])
    assert verdict.equal + verdict.refused.total() == ROWS


def test_the_layouts_are_those_of_many_publishers() -> None:
    """Each has a name of its own."""
    names = Counter(layout.name for layout in LAYOUTS)
    assert max(names.values()) == 1
    assert len(names) >= 150


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_golden_conversation_is_trained_as_the_reference_has_it(
    tokenizers: Tokenizers, name: str
) -> None:
    row = CONVERSATIONS[name]
    plain = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": row["answer"], "reasoning": row["reasoning"]},
    ]
    talk = Talk(
        [{**m, "calls": m.get("tool_calls", [])} for m in row["messages"] or plain], row["tools"]
    )
    for ours, theirs in tokenizers.values():
        [found] = tokenize_rows(ours, [row])
        trained = {place for start, end in found.trained for place in range(start, end)}
        tokens = [(token, place in trained) for place, token in enumerate(found.input_ids)]
        assert tokens == reference_tokens(theirs, talk)


LAYOUT = Layout(
    "one",
    t.plain,
    lambda talk, n: {"prompt": question_of(talk), "completion": talk.messages[-1]["content"]},
    lambda row: pair(row["prompt"], row["completion"]),
)


@pytest.mark.parametrize(
    "other",
    [
        {"role": "assistant", "content": "y = 2", "trained": True},
        {"role": "assistant", "content": "  y = 2", "trained": False},
        {"role": "assistant", "content": "  y = 2", "reasoning": "r"},
        {"role": "assistant", "content": "  y = 2 "},
    ],
)
def test_the_check_sees_a_difference(
    tmp_path: Path, tokenizers: Tokenizers, other: dict[str, Any]
) -> None:
    """Of one space, of the mask alone, and of reasoning."""
    question = {"role": "user", "content": "q"}
    right = Talk([question, {"role": "assistant", "content": "  y = 2"}])
    layout = replace(LAYOUT, talks=lambda n: right, read=lambda row: right)
    assert not check(layout, 1, tmp_path, tokenizers).differences
    wrong = Talk([question, other])
    layout = replace(
        LAYOUT,
        talks=lambda n: wrong,
        write=lambda talk, n: {"prompt": "q", "completion": "  y = 2"},
        read=lambda row: wrong,
    )
    assert check(layout, 1, tmp_path, tokenizers).differences


def test_the_check_sees_what_is_lost_and_not_named(tmp_path: Path) -> None:
    """A column, a key of a message, and a column without a name."""
    talk = t.plain(0)
    row = {"": 7, "note": "zebra", "messages": [{"role": "user", "content": "x", "mood": "glad"}]}
    [*lost] = unseen([(0, {}, talk)], [row], RowCounts())  # type: ignore[typeddict-item]
    assert len(lost) == 4, lost
    counts = RowCounts(unused=Counter({"(column 1)": 1, "note": 1, "messages[].mood": 1}))
    [content] = unseen([(0, {}, talk)], [row], counts)  # type: ignore[typeddict-item]
    assert content.startswith("messages.content is lost in 1 rows")


def test_the_page_lists_the_columns_and_counts_the_layouts() -> None:
    """Those of the code, in its order."""
    page = (FOLDER.parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    for part, names in PARTS.items():
        assert f"| {part} | {', '.join(names)} |" in page
    table = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"rows in {len(LAYOUTS)} published layouts" in text for text in (page, table))


def test_the_reference_knows_nothing_of_the_product() -> None:
    """Only what compares the two, and what loads the product's tokenizer, imports it."""
    using = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("qwen3ft"):
                using.add(path.name)
    assert using == {"check.py", "families.py"}
