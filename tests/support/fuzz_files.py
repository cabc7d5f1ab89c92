"""Random files of sound and broken records, in every supported format and compression.

Each comes with its sound records and the number of its broken ones. The same state of the generator
makes the same file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PIECES = (
    *("Which day", "weather", "问题", "答案", "été", "😀", "a\nb", "tab\t", 'say "hi"', "{", "}"),
    *("]", "}, {", '"question": ', ",", ";", "|", "\\", "\\n", "<think>", "<|im_end|>"),
    *("#### 4", "NaN", "\u2028", "\x85", "\x0c", "\ufeff", "'", "``", "  ", "0", "\r\n", "[[["),
    "//",
)
FORMATS = ("jsonl", "json", "pretty.json", "inside.json", "csv", "tsv", "semicolon.csv", "parquet")


@dataclass
class Made:
    """A file and its known records."""

    name: str
    content: bytes
    good: list[dict[str, Any]] = field(default_factory=list)
    """Values of the sound records, in order."""
    broken: int = 0
    is_counted: bool = True
    """Whether the readers' result is known: nothing but single records is damaged."""
    slack: int = 0
    """Good rows that may be lost or added, where the end of a broken one can only be guessed."""


def text(random: Random) -> str:
    """Return a few words, quotes, brackets and newlines."""
    return " ".join(random.choices(PIECES, k=random.randint(1, 6))) + random.choice(("", " ", "."))


def record(random: Random) -> dict[str, Any]:
    """Return a sound record with the usual columns; all values are text."""
    made = {"question": text(random), "answer": text(random)}
    if random.random() < 0.3:
        made["reasoning"] = text(random)
    if random.random() < 0.02:
        made["answer"] += "long " * random.randint(1, 4000)
    return made


def odd_record(random: Random) -> dict[str, Any]:
    """Return a record that is sound JSON, but perhaps not a valid row."""
    value: Any = random.choice((None, True, 4, 1.5, [], {}, "", "x", [["a"]], {"text": ["a"]}))
    turns = [{"role": random.choice(("user", "assistant", "x")), "content": value} for _ in "ab"]
    kinds: tuple[dict[str, Any], ...] = (
        {"question": value, "answer": text(random)},
        {"question": text(random), "answer": value},
        {"question": text(random), "answer": {"text": [text(random)], "answer_start": [0]}},
        {"question": text(random), "answer": text(random), "tools": value, "context": value},
        {"messages": turns},
        {"conversations": value},
        {"x": value},
        {"question": text(random), "answer": "b", "meta": {"nested": [[[[{"a": [{}]}]]]]}},
    )
    return random.choice(kinds)


def break_json(random: Random, good: bytes) -> bytes:
    """Break a JSON record in a random way, without newlines."""
    if random.random() < 0.0005:
        return good[:-1] + b', "x": "' + b"y" * (17 * 2**20) + b'"}'
    middle = random.randrange(1, len(good))
    deep = random.randint(70, 3000)
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: good[:middle] if random.random() < 0.5 else good[:-1],
        lambda: good.replace(b'"', b"", 1),
        lambda: good[::-1].replace(b'"', b"", 1)[::-1],
        lambda: good.replace(b'", "', b'" "', 1) if b'", "' in good else good[:-1],
        lambda: good.replace(b'"answer":', b'"answer"', 1),
        lambda: good[:-1] + b', "score": NaN}',
        lambda: good[:-1] + b', "score": -Infinity}',
        lambda: good[:-1] + b', "score": 1e999}',
        lambda: good[:-1] + b', "id": ' + b"7" * 5000 + b"}",
        lambda: good[:-1] + b', "x": "\\ud83d"}',
        lambda: good[:-1] + b', "x": "\\u0000"}',
        lambda: good[:-1] + b', "x": "\0"}',
        lambda: good[:-1] + b', "x": "\xc3\x28\xff"}',
        lambda: good[:-1] + b', "x": ' + b"[" * deep + b"]" * deep + b"}",
        lambda: good[:-1] + b', "x": ' + b'{"a":' * 90 + b"1" + b"}" * 90 + b"}",
        lambda: good[:-1] + b', "x": "\\q"}',
        lambda: good[:-1] + b",}",
        lambda: b'["question", "answer"]',
        lambda: random.choice((b"null", b"12", b'"text"', b"true")),
        lambda: b"garbage " + random.randbytes(8).hex().encode(),
        lambda: good.replace(b'"', b"'"),
    )
    return random.choice(ways)()


def is_broken_json(line: bytes) -> bool:
    """Return whether the line is broken; some damage makes another sound record."""
    if len(line) > 2**24 or any(mark in line for mark in (b"NaN}", b"Infinity}", b"1e999}")):
        return True
    try:
        value = json.loads(line.decode())
        json.dumps(value, ensure_ascii=False).encode()
        return not isinstance(value, dict) or "\\u0000" in json.dumps(value)
    except (ValueError, RecursionError):
        return True


def json_items(random: Random, count: int, share: float) -> tuple[list[bytes], Made]:
    """Return records as JSON, some of them broken."""
    made, items = Made("", b""), []
    for _ in range(count):
        values = record(random) if random.random() < 0.9 else odd_record(random)
        item = json.dumps(values, ensure_ascii=random.random() < 0.5).encode()
        if random.random() < share:
            broken = break_json(random, item)
            if is_broken_json(broken):
                items.append(broken)
                made.broken += 1
                continue
        items.append(item)
        made.good.append(values)
    return items, made


def make_json(random: Random, kind: str, count: int) -> Made:
    """Make JSON lines, an array on one line or many, or a list inside an object."""
    share = random.choice((0.0, 0.02, 0.3))
    items, made = json_items(random, count, share)
    if kind == "jsonl":
        end = random.choice((b"\n", b"\r\n", b"\n\n"))
        made.content = end.join(items) + random.choice((b"", end))
        return made
    made.slack = made.broken
    if kind == "pretty.json":
        made.content = b"[\n  " + b",\n  ".join(items) + b"\n]\n"
    elif kind == "inside.json":
        made.content = b'{"version": "1", "data": [' + b", ".join(items) + b'], "n": [1]}'
    else:
        made.content = b"[" + b",".join(items) + b"]"
    return made


def make_csv(random: Random, kind: str, count: int) -> Made:
    """Make a table; broken lines have a wrong width, a stray quote, bad UTF-8, or NUL."""
    delimiter = {"tsv": "\t", "semicolon.csv": ";"}.get(kind, ",")
    share, made = random.choice((0.0, 0.02, 0.2)), Made("", b"")
    names = ["question", "answer", "reasoning"]
    parts = [delimiter.join(names).encode()]
    for _ in range(count):
        values = {"reasoning": "", **record(random)}
        row = [values[name] for name in names]
        line = io.StringIO()
        csv.writer(line, delimiter=delimiter).writerow(row)  # quotes values with \r or \n
        written = line.getvalue().removesuffix("\r\n").encode()
        if random.random() < share:
            mark = delimiter.encode()
            broken = random.choice(
                (b"only one", mark * 5, b'"x"y' + mark * 2, b'"open' + mark * 2, b"\xff" + mark * 2)
            )
            made.slack += 3 * broken.startswith(b'"open')
            made.broken += 1
            parts.append(broken if random.random() < 0.9 else broken + b"\0")
        else:
            parts.append(written)
            made.good.append(dict(zip(names, row, strict=True)))
    end = random.choice((b"\n", b"\r\n"))
    made.content = end.join(parts) + random.choice((b"", end))
    return made


def make_parquet(random: Random, count: int) -> Made:
    """Make a table of texts, or of nested values, with bad UTF-8 in some cells."""
    made, sink = Made("", b""), io.BytesIO()
    values = [{"reasoning": None, **record(random)} for _ in range(count)]
    texts = {}
    bad = {n for n in range(count) if random.random() < 0.01}
    for name in ("question", "answer", "reasoning"):
        cells = [row[name] and row[name].encode() for row in values]
        if name == "question":
            cells = [cell + b"\xff" if n in bad else cell for n, cell in enumerate(cells)]
        raw = pa.array(cells, pa.binary())
        texts[name] = pa.Array.from_buffers(pa.string(), count, raw.buffers())
    if random.random() < 0.5:
        texts["messages"] = pa.array([[{"role": "user", "content": "x"}] for _ in values])
        texts["score"] = pa.array([random.choice((None, 1.5, -1e300)) for _ in values])
        values = [
            {**row, "messages": texts["messages"][n].as_py(), "score": texts["score"][n].as_py()}
            for n, row in enumerate(values)
        ]
    options = {
        "compression": random.choice(("none", "snappy", "zstd", "gzip")),
        "use_dictionary": random.random() < 0.5,
        "row_group_size": random.choice((1, 7, 100, 100_000)),
        "write_page_checksum": random.random() < 0.5,
    }
    pq.write_table(pa.table(texts), sink, **options)
    made.content = sink.getvalue()
    made.good = [row for n, row in enumerate(values) if n not in bad]
    made.broken = len(bad)
    return made


def damage(random: Random, content: bytes) -> bytes:
    """Damage a whole file in a random way."""
    at = random.randrange(len(content)) if content else 0
    end = at + random.randint(1, 2000)
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: content[:at],
        lambda: (
            content[:at]
            + bytes(byte ^ 1 << random.randrange(8) for byte in content[at:end])
            + content[end:]
        ),
        lambda: content[:at] + random.randbytes(random.randint(1, 300)) + content[at:],
        lambda: content[:at] + content[end:],
        lambda: content[:at] + bytes(random.randint(1, 5000)) + content[at:],
        lambda: content + random.randbytes(50),
        lambda: content[at:],
        lambda: content[:at] + content[at:end] * 3 + content[end:],
        lambda: content[:at] + random.choice((b"[", b"{", b'"', b"]")) * 100_000 + content[at:],
        lambda: content.decode("utf-8", "replace").encode("utf-16"),
        lambda: random.randbytes(len(content) % 5000),
        lambda: b"",
    )
    return random.choice(ways)()


def pack(random: Random, made: Made) -> None:
    """Compress some files, some of them as several members, and damage some after that."""
    suffix = random.choice(("", "", ".gz", ".zst"))
    if not suffix:
        return
    cut = random.randrange(len(made.content) + 1) if random.random() < 0.3 else 0
    compress = zst if suffix == ".zst" else lambda content: gzip.compress(content, 1, mtime=0)
    made.content = b"".join(compress(part) for part in (made.content[:cut], made.content[cut:]))
    made.name += suffix
    if random.random() < 0.15:
        made.content, made.is_counted = damage(random, made.content), False


def zst(content: bytes) -> bytes:
    """Compress `content` as one frame."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def make(random: Random, number: int, count: int) -> Made:
    """Make one file."""
    kind = FORMATS[number % len(FORMATS)]
    if kind == "parquet":
        made = make_parquet(random, count)
    elif kind.endswith(("csv", "tsv")):
        made = make_csv(random, kind, count)
    else:
        made = make_json(random, kind, count)
    if random.random() < 0.3:
        made.content, made.is_counted = damage(random, made.content), False
    made.name = kind
    if kind != "parquet":
        pack(random, made)
    made.name = f"{number}.{made.name}"
    return made
