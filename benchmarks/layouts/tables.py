"""Layouts as other tools write files: tables with numbers of rows, padding, unions."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.layouts import talks as t
from benchmarks.layouts.forms import (
    CHATML,
    compact,
    messages,
    plain_messages,
    qa,
    read_history,
    read_openai_tools,
    write_openai_tools,
)
from benchmarks.layouts.layout import (
    Layout,
    answer_of,
    history_of,
    pair,
    question_of,
    rule_of,
    turns,
)
from benchmarks.layouts.talks import JsonDict, Talk


def write_union(talk: Talk, n: int) -> JsonDict:
    """Write one of three layouts, with the columns of all of them."""
    row: JsonDict = dict.fromkeys(
        ("messages", "instruction", "input", "output", "prompt", "completion", "system")
    )
    if n % 3 == 0:
        row["messages"] = plain_messages(talk)
    elif n % 3 == 1:
        row |= {"instruction": question_of(talk), "output": answer_of(talk)}
    else:
        row |= {"prompt": question_of(talk), "completion": answer_of(talk)}
    return row | ({"system": rule_of(talk)} if n % 3 else {})


def read_union(row: JsonDict) -> Talk:
    """Read a row whose columns are null where they do not apply."""
    if row["messages"]:
        return Talk(turns(row["messages"], CHATML))
    asked = row["instruction"] or row["prompt"]
    return pair(asked, row["output"] or row["completion"], row["system"])


def table(**beside: Any) -> Any:
    """Return writer and parser of a table of texts."""
    return qa("question", "answer", **beside)


LAYOUTS = [
    Layout("csv", t.plain, *table(), ".csv"),
    Layout("csv with the numbers of rows of pandas", t.plain, *qa(
        "question", "answer", **{"": lambda n: str(96000 + n)}), ".csv"),
    Layout("csv with the numbers of rows twice", t.plain, *qa(
        "question", "answer",
        **{"": lambda n: str(96000 + n), "Unnamed: 0": lambda n: str(97000 + n)}), ".csv"),
    Layout("csv with an index of the datasets library", t.plain, *qa(
        "question", "answer", __index_level_0__=lambda n: str(98000 + n)), ".csv"),
    Layout("csv with messages as JSON", t.ruled_chat, lambda talk, n: {
        "messages": compact(plain_messages(talk)),
    }, lambda row: Talk(turns(json.loads(row["messages"]), CHATML)), ".csv"),
    Layout("tsv with Chinese columns", t.reasoned, *qa("问题", "回答", reasoning="推理"), ".tsv"),
    Layout("json lines, compressed", t.ruled_chat, *messages(), ".jsonl.gz"),
    Layout("parquet of messages with calls, padded", t.called_often, lambda talk, n: {
        "messages": write_openai_tools(talk, as_text=False, ids=True), "tools": talk.tools,
    }, lambda row: read_openai_tools(row["messages"], row["tools"]), ".parquet"),
    Layout("parquet of messages with flags, padded", t.flagged, lambda talk, n: {
        "messages": [
            {"role": m["role"], "content": m["content"],
             **({"train": m.get("trained", True)} if m["role"] == "assistant" else {})}
            for m in talk.messages
        ],
    }, lambda row: Talk([
        {**m, **({"trained": False} if x.get("train") is False else {})}
        for x, m in zip(row["messages"], turns(row["messages"], CHATML), strict=True)
    ]), ".parquet"),
    Layout("parquet of histories", t.ruled_chat, lambda talk, n: {
        "system": rule_of(talk), "query": question_of(talk), "response": answer_of(talk),
        "history": history_of(talk),
    }, read_history, ".parquet"),
    Layout("union of layouts with nulls", t.ruled, write_union, read_union),
    Layout("union of layouts with nulls, parquet", t.ruled, write_union, read_union, ".parquet"),
]  # fmt: skip
