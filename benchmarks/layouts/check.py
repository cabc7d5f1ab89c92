"""One layout through the product's reading and tokenising, compared with its reference."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.layouts import (
    axolotl,
    calls,
    chats,
    chinese,
    llama_factory,
    openai,
    preferences,
    reasoning,
    servers,
    swift,
    tables,
    trl,
)
from benchmarks.layouts.layout import Layout
from benchmarks.layouts.reference import Tokens, reference_tokens
from benchmarks.layouts.talks import JsonDict, Talk
from qwen3ft.chat.rendering import tokenize_rows
from qwen3ft.config import ColumnNames
from qwen3ft.data.rows import RowCounts, RowRules, read_file
from qwen3ft.records.data import BadRow, QaRow, SourceFile

_PUBLISHERS = (
    *(llama_factory, swift, axolotl, trl, openai, servers, calls),
    *(chinese, reasoning, chats, preferences, tables),
)
LAYOUTS = [layout for publisher in _PUBLISHERS for layout in publisher.LAYOUTS]

_FORM = re.compile(
    "role|from|type|kind|group|split|label|kto_tag|weight|loss_weight|loss|train|training"
)
"""Keys whose values say what a text is, and whether it is trained."""
_MARKS = re.compile("</?think>|</?tool_call>|</?tool_response>|####")


@dataclass
class Verdict:
    """Result of one layout."""

    equal: int = 0
    """Rows trained as the reference has them, for every tokenizer."""
    refused: Counter[str] = field(default_factory=Counter)
    """Rows that are refused as they should be, by reason."""
    differences: list[str] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    """Good rows by what of them is named as not used."""
    changed: Counter[str] = field(default_factory=Counter)


def check(
    layout: Layout, rows: int, folder: Path, tokenizers: Mapping[str, tuple[Any, Any]]
) -> Verdict:
    """Write `rows` rows in the layout, read them, and compare each with the reference.

    Args:
        layout: The layout.
        rows: Number of rows.
        folder: Where the file is written.
        tokenizers: By name, the product's tokenizer and that of the reference.
    """
    verdict = Verdict()
    talks = [layout.talks(n) for n in range(rows)]
    written = [layout.write(talk, n) for n, talk in enumerate(talks)]
    path = write_rows(folder / f"rows{layout.suffix}", written)
    rules = RowRules(ColumnNames(**layout.columns), layout.separator)
    counts = RowCounts()
    found = list(read_file(SourceFile(path.name, path, "train"), rules, counts))
    verdict.unused, verdict.changed = counts.unused, counts.changed
    if len(found) != rows:
        verdict.differences.append(f"{len(found)} rows of {rows}")
        return verdict
    expected = [layout.read(row) for row in written]
    good: list[tuple[int, QaRow, Talk]] = []
    for n, (row, talk) in enumerate(zip(found, expected, strict=True)):
        if isinstance(talk, Talk) and talk != talks[n]:
            verdict.differences.append(f"row {n}: the parser reads {talk}, written was {talks[n]}")
        elif isinstance(row, BadRow) != isinstance(talk, str):
            what = f"{row.reason}: {row.excerpt}" if isinstance(row, BadRow) else "not refused"
            verdict.differences.append(f"row {n}: {what}")
        elif isinstance(row, BadRow):
            if row.reason == talk:
                verdict.refused[row.reason] += 1
            else:
                verdict.differences.append(f"row {n}: refused for {row.reason}, not {talk}")
        else:
            assert isinstance(talk, Talk)
            good.append((n, row, talk))
    verdict.differences += unseen(good, written, counts)
    differ = {n for n, *_ in good if verdict.differences}
    for name, (ours, theirs) in tokenizers.items():
        differ |= _compare(name, good, ours, theirs, verdict)
    verdict.equal = len(good) - len(differ)
    return verdict


def write_rows(path: Path, rows: list[JsonDict]) -> Path:
    """Write rows in the format that the name's ending says; return the path."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            delimiter = "," if path.suffix == ".csv" else "\t"
            table = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text(lines, encoding="utf-8")
    return path


def _compare(
    name: str, good: list[tuple[int, QaRow, Talk]], ours: Any, theirs: Any, verdict: Verdict
) -> set[int]:
    """Return the rows whose tokens or mask differ, and describe them in `verdict`."""
    differ = set()
    tokenized = tokenize_rows(ours, [row for _, row, _ in good])
    for (n, _, talk), row in zip(good, tokenized, strict=True):
        trained = {place for start, end in row.trained for place in range(start, end)}
        found = [(token, place in trained) for place, token in enumerate(row.input_ids)]
        wanted = reference_tokens(theirs, talk)
        if found != wanted:
            differ.add(n)
            shown = f"{_shown(ours, found)}\n  wanted {_shown(theirs, wanted)}"
            verdict.differences.append(f"row {n}, {name}:\n  found  {shown}")
    return differ


def _shown(tokenizer: Any, tokens: Tokens) -> str:
    """Return the text, what carries loss in brackets."""
    text, before = "", False
    for token, trained in [*tokens, (None, False)]:
        text += "[" * (trained and not before) + "]" * (before and not trained)
        text += "" if token is None else tokenizer.decode([token])
        before = trained
    return repr(text)


def unseen(
    good: list[tuple[int, QaRow, Talk]], written: list[JsonDict], counts: RowCounts
) -> Iterator[str]:
    """Yield the keys that have something in a good row that is neither trained nor named."""
    named: Counter[str] = Counter()
    for name, rows in counts.unused.items():
        key = name.split(".")[-1].removesuffix("[1:]")
        named["" if key.startswith("(") else key] += rows  # "(column 1)" has no name
    lost: Counter[str] = Counter()
    for n, _, talk in good:
        everything = json.dumps([talk.messages, talk.tools], ensure_ascii=False)
        lost.update({keys for keys, text in _leaves(written[n]) if text not in everything})
    for path, rows in lost.items():
        keys = path.split("\0")
        if rows > max(named[key] for key in keys):
            yield f"{'.'.join(keys)} is lost in {rows} rows, and not named"


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield the path and, as JSON writes it, the text of each thing that is said in a row."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not _FORM.fullmatch(key) or isinstance(item, (list, Mapping)):
                yield from _leaves(item, (*keys, key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, keys)
    elif isinstance(value, str):
        if value.startswith(("{", "[")) and isinstance(inner := _json(value), (dict, list)):
            yield from _leaves(inner, keys)
            return
        for piece in _MARKS.split(value):
            inner = _json(piece) if piece.strip().startswith("{") else None
            if isinstance(inner, dict):
                yield from _leaves(inner, keys)
            elif piece.strip():
                yield "\0".join(keys), json.dumps(piece.strip(), ensure_ascii=False)[1:-1]
    elif value is not None:
        yield "\0".join(keys), json.dumps(value)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
