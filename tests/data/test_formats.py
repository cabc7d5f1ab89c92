"""Raw rows of files: every format gives the same rows, and damage costs what is damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3ft.data.readers.open import read_raw
from qwen3ft.data.readers.raw import MAX_ROW_BYTES, RawRow, UnreadableFileError

ROWS = [
    {"question": f'第{n}个,"问题"; a\tb|c 😀', "answer": f"line 1\nline {n}\r\nend", "kind": "x"}
    for n in range(40)
]


def zst(content: bytes) -> bytes:
    """Return `content` as one frame."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zst}


def read(path: Path, limit: int = MAX_ROW_BYTES) -> list[RawRow]:
    """Return all raw rows of a file."""
    return list(read_raw(path, list, limit))


def write(path: Path, content: bytes | str) -> Path:
    """Write `content` to `path` and return it."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def outcome(path: Path, limit: int = MAX_ROW_BYTES) -> list[Any]:
    """Return the reason, or else the first value, of each row."""
    return [row.reason or next(iter(row.values.values()), None) for row in read(path, limit)]


def as_csv(rows: list[dict[str, Any]], delimiter: str, end: str = "\n") -> bytes:
    """Return rows under a line of names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def every_format(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return name and content of files that hold `rows`, in each format but parquet."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {
        "a.jsonl": lines.encode(),
        "crlf.jsonl": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode(),
        "unended.jsonl": lines.rstrip().encode(),
        "lines.json": lines.encode(),
        "array.json": json.dumps(rows).encode(),
        "pretty.json": json.dumps(rows, ensure_ascii=False, indent=2).encode(),
        "marked.json": b"\xef\xbb\xbf" + json.dumps(rows).encode(),
        "inside.json": json.dumps({"version": [{"n": 1}], "data": rows, "n": 1}).encode(),
        "one_a_line.json": ("[\n" + lines.strip().replace("}\n", "},\n") + "\n]").encode(),
        "objects.json": "\n".join(json.dumps(row, indent=1) for row in rows).encode(),
        "comma.csv": as_csv(rows, ","),
        "marked.csv": b"\xef\xbb\xbf" + as_csv(rows, ",", "\r\n"),
        "semicolon.csv": as_csv(rows, ";"),
        "tab.csv": as_csv(rows, "\t"),
        "bar.csv": as_csv(rows, "|").rstrip(),
        "tab.tsv": as_csv(rows, "\t"),
    }


def test_the_same_rows_come_out_of_every_format_and_compression(tmp_path: Path) -> None:
    """Sixteen layouts, plain, gzip and zstd, and parquet give identical values."""
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for name, content in every_format(ROWS).items():
        write(tmp_path / name, content)
        for suffix, pack in PACK.items():
            write(tmp_path / (name + suffix), pack(content))
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 49
    for path in paths:
        assert [row.values for row in read(path)] == ROWS, path.name


@pytest.mark.parametrize("name", list(every_format(ROWS)))
def test_the_offset_and_the_line_are_where_the_row_starts(tmp_path: Path, name: str) -> None:
    """A row's text starts at its byte, and as many newlines come before as its line says."""
    content = every_format(ROWS)[name]
    rows = read(write(tmp_path / name, content))
    for number, row in enumerate(rows):
        rest = content[row.offset :].decode()
        if rest.startswith("{"):
            assert json.JSONDecoder().raw_decode(rest)[0] == row.values
        else:
            assert rest.startswith(f'"第{number}个')
        assert content[: row.offset].count(b"\n") + 1 == row.line
    assert len(rows) == len(ROWS)


ELEMENTS = {
    b'{"q": NaN}': "nan_literal",
    b'{"q": [1, -Infinity]}': "nan_literal",
    b'{"q": 1e999}': "number_out_of_range",
    b'{"q": ' + b"9" * 5000 + b"}": "number_out_of_range",
    b'{"q": "\\ud800"}': "lone_surrogate",
    b'{"q": "a\\u0000b"}': "nul",
    b'{"q": "a\0b"}': "nul",
    b'{"q": "\xff"}': "invalid_utf8",
    b'{"q": "\xed\xa0\x80"}': "invalid_utf8",
    b'{"q": ' + b"[" * 70 + b"]" * 70 + b"}": "too_deep",
    b'{"q": ' + b"[" * 5000 + b"]" * 5000 + b"}": "too_deep",
    b'{"q": "' + b"x" * 5000 + b'"}': "row_too_large",
    b'{"q": "a" "r": 1}': "broken_json",
    b'{"q": "said "hi" to"}': "broken_json",
    b'{"q": "said "}" to"}': "broken_json",
    b'{"q": "a", "r": 1': "broken_json",
    b'{"q": "a, "r": 1}': "broken_json",
    b'{"q": "a}': "broken_json",
    b'{"q": [1, 2, "r": 1}': "broken_json",
    b'{"q": "\\x"}': "broken_json",
    b'{"q": "a",}': "broken_json",
    b"{'q': 'a'}": "broken_json",
    b"oops": "broken_json",
    b'["q", "a"]': "not_an_object",
    b"12": "not_an_object",
    b"null": "not_an_object",
}


@pytest.mark.parametrize(("element", "reason"), ELEMENTS.items(), ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("layout", ["compact", "own_line", "inside", "lines"])
def test_a_bad_element_costs_itself_and_says_why(
    tmp_path: Path, element: bytes, reason: str, layout: str
) -> None:
    """In an array, in a list of an object and on a line, its neighbours come out whole."""
    limit = 1000 if reason == "row_too_large" else 20_000
    good = [json.dumps({"q": f"é{n}", "r": [{"q": n}]}).encode() for n in range(6)]
    items = [good[0], good[1], element, good[2], element, *good[3:]]
    content = {
        "compact": b"[" + b", ".join(items) + b"]",
        "own_line": b"[\n  " + b",\n  ".join(items) + b"\n]\n",
        "inside": b'{"rows": [' + b",".join(items) + b'], "n": 1}',
        "lines": b"\n".join(items),
    }[layout]
    path = write(tmp_path / ("a.jsonl" if layout == "lines" else "a.json"), content)
    assert outcome(path, limit) == ["é0", "é1", reason, "é2", reason, "é3", "é4", "é5"]


@pytest.mark.parametrize("element", [b'{"q": "a, "r": 1}', b'{"q": "a", "r": 1', b"oops", b"{"])
def test_a_bad_first_or_last_element_does_not_hide_the_list(tmp_path: Path, element: bytes) -> None:
    """Without earlier elements, or without later ones, it costs itself."""
    good = b'{"q": "fine", "r": 2}'
    for order in ([element, good, good], [good, good, element]):
        for start, end in ((b"[", b"]"), (b'{"data": [', b'], "n": 1}')):
            path = write(tmp_path / "a.json", start + b",".join(order) + end)
            assert sorted(outcome(path)) == ["broken_json", "fine", "fine"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b" \n ", []),
        (b"[]", []),
        (b"[\n]\n\n", []),
        (b'{"data": []}', []),
        (b'[{"q": 1},]', [1]),
        (b'[{"q": 1} {"q": 2}]', [1, 2]),
        (b'[{"q": 1}][{"q": 2}]', [1, 2]),
        (b'[{"q": 1}], {"q": 2}]', [1, 2]),
        (b'[oops, 12e, {"q": 2}]', ["broken_json", 2]),
        (b'{"train": [{"q": 1}], "n": {"data": [{}]}, "data": [{"q": 2}]}', [1, 2]),
        (b'{"data": ["x", {"q": 1}]}', ["not_an_object", 1]),
        (b'{"data": [["x"], {"q": 1}]}', ["not_an_object", 1]),
        (b'{"data": [1, [2]], "q": {"r": 1}}', [[1, [2]]]),
        (b'{"q": 1}', [1]),
        (b'{"q": 1, "data": 3}', [1]),
        (b'{\n"q": 1\n}\n{"q": 2}', [1, 2]),
        (b'{"messages": [{"role": 1}]}', [[{"role": 1}]]),
        (b'{"data": [{"q": 1}]}\n{"data": [{"q": 1}]}', [[{"q": 1}], [{"q": 1}]]),
        (b'{"q": 1\n{"q": 2}\n{"q": 3}\n', ["broken_json", 2, 3]),
    ],
)
def test_what_a_json_file_may_look_like(tmp_path: Path, content: bytes, expected: Any) -> None:
    """Empty files and lists, commas and brackets too many or missing, lines, objects."""
    assert outcome(write(tmp_path / "a.json", content)) == expected


@pytest.mark.parametrize(
    "content",
    [
        b'[{"q": 1}, {"q": "cut of',
        b'[{"q": 1}, {"q": 2}',
        b'[{"q": 1},\n',
        b'{"data": [{"q": 1}]',
        b'{"data": [{"q": 1}], "n": ',
        b'{"data": [{"q": 1}], "n": 1} and more',
        b'{"data": [{"q": 1}], "n": 1}]',
    ],
)
def test_a_list_that_does_not_end_makes_the_file_unreadable(tmp_path: Path, content: bytes) -> None:
    """The elements before come out, and the error says that something is missing."""
    rows = read_raw(write(tmp_path / "a.json", content), list)
    assert next(rows).values == {"q": 1}
    with pytest.raises(UnreadableFileError, match="line"):
        list(rows)


def test_broken_json_without_a_next_element_is_an_error_with_a_command(tmp_path: Path) -> None:
    """The message has the line, the byte, and the command that turns the list into lines."""
    path = write(tmp_path / "a b.json.gz", gzip.compress(b'{"data": [{"q": 1},\n{"q": "x'))
    rows = read_raw(path, list)
    assert next(rows).values == {"q": 1}
    command = rf"""line 2, at byte 20.* jq -c '\."data"\[\]' <\(gzip -dc '{path}'\) > 'a b.jsonl'"""
    with pytest.raises(UnreadableFileError, match=command):
        next(rows)


def test_a_bracket_that_is_never_closed_stays_cheap(tmp_path: Path) -> None:
    """Each of many elements seems to reach to the end of the file; the cost is bounded."""
    element = json.dumps({"q": "x" * 100, "r": [{"role": "a"}]})
    items = [element.replace("}]", "}") if n % 2 else element for n in range(20_000)]
    path = write(tmp_path / "a.json", "[" + ", ".join(items) + "]")
    found = outcome(path)
    assert (found.count("broken_json"), found.count("x" * 100)) == (10_000, 10_000)


def objects(count: int) -> str:
    """Return nested objects, all closed."""
    return '{"a":' * count + "1" + "}" * count


# Rows with one element in them that nests so many levels, and what comes out of them.
DEEP: dict[str, tuple[Callable[[int], str], list[str]]] = {
    "objects": (lambda n: f'[{{"q": 1}}, {objects(n)}, {{"q": 2}}]', ["", "too_deep", ""]),
    "objects on lines": (
        lambda n: '[{"q": 1},\n' + '{"q":\n' * n + "1" + "}\n" * n + ', {"q": 2}]',
        ["", "too_deep", ""],
    ),
    "arrays": (lambda n: f'[{{"q": 1}}, {"[" * n}{"]" * n}, {{"q": 2}}]', ["", "too_deep", ""]),
    "both": (
        lambda n: '[{"q": 1}, ' + '[{"q": 1}, {"q":' * n + "0" + "}]" * n + ', {"q": 2}]',
        ["", "too_deep", ""],
    ),
    "in a field": (lambda n: f'[{{"q": {objects(n)}}}, {{"q": 2}}]', ["too_deep", ""]),
    "in a list of an object": (
        lambda n: f'{{"data": [{{"q": 1}}, {objects(n)}, {{"q": 2}}], "n": 1}}',
        ["", "too_deep", ""],
    ),
    "brackets in texts": (
        lambda n: '[{"q": 1}, ' + r'{"}\"]":' * n + '"]"' + "}" * n + ', {"q": 2}]',
        ["", "too_deep", ""],
    ),
    "one after the other": (lambda n: f"{objects(n)}\n{objects(n)}\n", ["too_deep"] * 2),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("levels", [70, 2_000, 100_000])
@pytest.mark.timeout(120)
def test_an_element_that_nests_too_deeply_costs_itself(
    tmp_path: Path, name: str, levels: int
) -> None:
    """However deep it is, as in a file of JSON lines; its neighbours come out whole."""
    make, expected = DEEP[name]
    rows = read(write(tmp_path / "a.json", make(levels)))
    assert [row.reason for row in rows] == expected
    lines = read(write(tmp_path / "a.jsonl", f'{{"q": 1}}\n{objects(levels)}\n{{"q": 2}}\n'))
    assert [row.reason for row in lines] == ["", "too_deep", ""]


# Files of many starts, each of which seems to reach to the end.
ENDLESS: dict[str, Callable[[int], str]] = {
    "objects": lambda n: '[{"q": 1},' + '{"q":' * n,
    "objects on lines": lambda n: '[{"q": 1},\n' + '{"q":\n' * n,
    "objects behind commas": lambda n: '[{"q": 1},' + '{"q": 1,' * n,
    "arrays": lambda n: '[{"q": 1},' + "[\n" * n,
    "lists of rows": lambda n: '{"data": [{"q": 1}, ' + '{"data": [{"data": [{"q": 1}]}, ' * n,
    "lists of another name": lambda n: '{"data": [{"q": 1}]' + ', "x": [{"q": 1}]' * n + ', "y": ',
    "brackets closed twice": lambda n: '[{"q": 1}' + ', {"q": 1]' * n,
    "quotes": lambda n: '[{"q": 1}' + ', {"q": "\n{"q"' * n,
    "escaped quotes": lambda n: '[{"q": 1}, ' + "[" * 2_000 + '"' + r"\"" * n,
    "white space": lambda n: '[{"q": 1}, {"q": x' + "\n" * (10 * n) + '{"r"',
    "names": lambda n: '[{"q": 1}' + "".join(f',\n{{"q{i}": x' for i in range(n)),
    "backslashes": lambda n: '[{"q": 1}, {"q": "' + "\\" * (10 * n + 1),
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.timeout(120)
def test_a_file_of_elements_without_an_end_takes_no_longer_than_it_grows(
    tmp_path: Path, name: str
) -> None:
    """20,000 of each: where time grew with their square, this would take minutes."""
    found = []
    rows = read_raw(write(tmp_path / "a.json", ENDLESS[name](20_000)), list)
    with suppress(UnreadableFileError):
        for row in rows:
            found.append(row)  # noqa: PERF402  # those before the error are wanted
    assert found[0].values == {"q": 1}


RAIN = {
    "context": 'It rains. {"qas": [{}]}',
    "qas": [
        {"question": "Does it?", "id": "1", "answers": [{"text": "yes", "answer_start": 3}]},
        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
    ],
}
SUN = {"context": "Sun.", "qas": [{"answers": [{"text": "s"}], "id": "3"}]}
BROKEN = {"title": "b", "paragraphs": [{"context": "c", "qas": [{"id": "4"}, 7]}, 8]}
NOTHING = {"context": "Nothing asked.", "qas": []}
SQUAD = {"version": "2.0", "data": [{"title": "天气", "paragraphs": [RAIN, SUN, NOTHING]}, BROKEN]}


@pytest.mark.parametrize("indent", [None, 2])
def test_squad_gives_one_row_per_question(tmp_path: Path, indent: int | None) -> None:
    """With its context and title, at the byte of its article; a wrong layout is a bad row."""
    content = json.dumps(SQUAD, ensure_ascii=False, indent=indent).encode()
    rows = read(write(tmp_path / "squad.json", content))
    good = [row.values for row in rows if not row.reason]
    assert [values["id"] for values in good] == ["1", "2", "3", "4"]
    assert good[0] == {
        "question": "Does it?",
        "id": "1",
        "answers": [{"text": "yes", "answer_start": 3}],
        "context": 'It rains. {"qas": [{}]}',
        "title": "天气",
    }
    assert [row.reason for row in rows[4:]] == ["broken_squad"] * 2
    for row in rows:
        article = json.JSONDecoder().raw_decode(content[row.offset :].decode())[0]
        assert article in SQUAD["data"]
        assert content[: row.offset].count(b"\n") + 1 == row.line


CSV_CASES = {
    b"": [],
    b"\n\n": [],
    b"q,a\n": [],
    b"q,a": [],
    b'q,a\n"open,1\ntwo,2\nthree,3\n': ["broken_csv", "two", "three"],
    b'q,a\n"open,1\ntwo,2\n"x\ny",3\nfour,4\n': ["broken_csv", "two", "x\ny", "four"],
    b'q,a\none,1\n"open,1': ["one", "broken_csv"],
    b'q,a\n"open,1\ntwo,2\n"open,3\nfour,4\n': ["broken_csv", "two", "broken_csv", "four"],
    b'q,a\n"open,1\ntwo,2\n5",ok\nsix,6\n': ["open,1\ntwo,2\n5", "six"],
    b'q,a\n"open,1,1\ntwo,2\n5",ok,1\nsix,6\n': ["broken_csv", "two", "wrong_column_count", "six"],
    b'q,a\n5" pipe,1\n"a ""b""",2\n': ['5" pipe', 'a "b"'],
    b'q,a\n"x"y,1\ntwo,2\n': ["broken_csv", "two"],
    b"q,a\na\0b,1\ntwo,2\n": ["nul", "two"],
    b'q,a\n"a\n\0",1\ntwo,2\n': ["broken_csv", "nul", "two"],
    b"q,a\n\xff,1\ntwo,2\n": ["invalid_utf8", "two"],
    b"q,a\n" + b"x" * 3000 + b",1\ntwo,2\n": ["row_too_large", "two"],
    b'q,a\n"' + b"x,1\n" * 1000 + b'",1\n': ["broken_csv", *["x"] * 999, "broken_csv"],
    b'\n"q\nr";a\n1;2\n': ["1"],
    b"q\n1\n\n2\n": ["1", "2"],
}


@pytest.mark.parametrize(("content", "expected"), CSV_CASES.items(), ids=lambda v: str(v)[:30])
def test_a_bad_csv_record_costs_itself(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    """A quote that is never closed costs one line, and its neighbours come out whole."""
    assert outcome(write(tmp_path / "a.csv", content), limit=2000) == expected


def test_quotes_never_closed_stay_cheap(tmp_path: Path) -> None:
    """Each of many lines opens a quote that no later line closes with an error."""
    lines = ['a","""' if n % 2 else "good,1" for n in range(20_000)]
    path = write(tmp_path / "a.csv", "q,a\n" + "\n".join(lines) + "\n")
    found = outcome(path)
    assert found.count("good") == 10_000


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_names_that_cannot_be_read_make_the_file_unreadable(tmp_path: Path, name: str) -> None:
    """Without names there are no rows."""
    content = b'"never closed\n1,2\n'
    write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UnreadableFileError, match="column names"):
        read(tmp_path / name)


SEPARATED = {
    b"sep=;\r\nq;a,b\r\n1,5;2\r\n": ["1,5"],
    b"sep=\t\nq\ta;b;c\n1\t2\n": ["1"],
    b"sep=\\t\nq\ta;b;c\n1\t2\n": ["1"],
    b'"sep=|"\nq|a,b,c\n1|2\n': ["1"],
    b"\xef\xbb\xbfSEP=^\nq^a,b\n1^2\n": ["1"],
    b'"sep=,",\nq,a;b;c\n1,2\n': ["1"],
    b"sep=;;;\nq;a;b,c,d,e\n1;2;3\n": ["1"],
    b"sep=;": [],
    b"sep=x\n1\n": ["1"],
    b"separator;a\n1;2\n": ["1"],
}


@pytest.mark.parametrize(("content", "expected"), SEPARATED.items(), ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_first_line_that_states_the_delimiter_is_obeyed(
    tmp_path: Path, content: bytes, expected: list[str], name: str
) -> None:
    """Excel writes sep=; and reads it; the line is no row, and counts as a line."""
    if name == "a.tsv" and b"=" not in content:
        return
    rows = read(write(tmp_path / name, content))
    assert [next(iter(row.values.values())) for row in rows] == expected
    assert [content[: row.offset].count(b"\n") + 1 for row in rows] == [row.line for row in rows]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_members_one_after_the_other_are_one_file(tmp_path: Path, suffix: str) -> None:
    """`cat a.gz b.gz` makes such files."""
    content = every_format(ROWS)["a.jsonl"]
    parts = [content[:100], b"", content[100:1000], content[1000:]]
    path = write(tmp_path / f"a.jsonl{suffix}", b"".join(map(PACK[suffix], parts)))
    assert [row.values for row in read(path)] == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *(("jsonl", "cut"), ("json", "flipped"), ("csv", "garbage")),
        *(
            pytest.param(kind, damage, marks=pytest.mark.slow)
            for kind, damage in (
                *(("json", "cut"), ("csv", "cut"), ("jsonl", "flipped"), ("csv", "flipped")),
                *(("jsonl", "garbage"), ("json", "garbage")),
            )
        ),
    ],
)
def test_a_damaged_compressed_file_gives_its_rows_up_to_the_damage(
    tmp_path: Path, suffix: str, kind: str, damage: str
) -> None:
    """Rows before it are right; then the file is unreadable."""
    from random import Random

    random = Random(0)
    rows = [{"question": random.randbytes(40).hex(), "answer": str(n)} for n in range(8000)]
    packed = PACK[suffix](
        every_format(rows)[
            "array.json" if kind == "json" else {"jsonl": "a.jsonl", "csv": "comma.csv"}[kind]
        ]
    )
    middle = len(packed) * 3 // 4
    content = {
        "cut": packed[:middle],
        "flipped": packed[:middle] + bytes(byte ^ 255 for byte in packed[middle:]),
        "garbage": packed + b"not a member",
    }[damage]
    path, found = write(tmp_path / f"a.{kind}{suffix}", content), []

    def collect() -> None:
        for row in read_raw(path, list):
            found.append(row)  # noqa: PERF402  # those before the error are wanted

    with pytest.raises(UnreadableFileError):
        collect()
    whole = [row.values for row in found if not row.reason]
    assert len(whole) > len(rows) // 2
    assert whole[: len(rows) // 2] == rows[: len(rows) // 2]


BOMB = """
import sys
from pathlib import Path
from qwen3ft.data.readers.open import read_raw
import pyarrow, pyarrow.parquet
def peak():
    [line] = [x for x in Path("/proc/self/status").read_text().split("\\n") if "VmHWM" in x]
    return int(line.split()[1]) // 1024
before = peak()
reasons = [row.reason for row in read_raw(Path(sys.argv[1]), list, 4 * 2**20)]
print(peak() - before, reasons)
"""


@pytest.mark.parametrize(
    ("name", "head", "tail", "expected"),
    [
        ("a.jsonl.gz", b'{"q": "', b'"}\n{"q": 1}', ["row_too_large", ""]),
        ("a.json.zst", b'[{"q": 1}, {"q": "', b'"}, {"q": 1}]', ["", "row_too_large", ""]),
        ("a.json.gz", b'{"data": [{"q": 1}, ', b"]}", ["", "row_too_large"]),
        ("a.csv.zst", b'q,a\n"', b'",1\nx,1\n', ["row_too_large", ""]),
    ],
)
def test_a_file_that_unpacks_to_much_more_is_read_in_bounded_memory(
    tmp_path: Path, name: str, head: bytes, tail: bytes, expected: list[str]
) -> None:
    """40 MB of one text, with rows of 4 MB at most: 35 MB are held at most."""
    filler = b"x" * 2**20
    path = tmp_path / name
    with pa.CompressedOutputStream(str(path), "gzip" if name.endswith("gz") else "zstd") as out:
        out.write(head)
        for _ in range(40):
            out.write(filler)
        out.write(tail)
    assert path.stat().st_size < 2**20
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(path)], capture_output=True, text=True, check=True
    )
    held, _, reasons = done.stdout.partition(" ")
    assert int(held) < 40
    assert reasons.strip() == str(expected)


def test_parquet_nested_values_come_out_as_python_and_bad_text_costs_its_row(
    tmp_path: Path,
) -> None:
    """Lists of structures are lists of dicts; invalid UTF-8 inside them costs one row."""
    messages = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "bad"}], None]
    table = pa.table({"messages": messages, "n": [1, 2, 3]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="none", use_dictionary=False)
    assert [row.values["messages"] for row in read(path)] == messages
    write(path, path.read_bytes().replace(b"bad", b"b\xffd"))
    assert [row.reason for row in read(path)] == ["", "invalid_utf8", ""]


def test_parquet_gives_only_the_columns_that_were_chosen(tmp_path: Path) -> None:
    """Rows are numbered over all row groups and have no offset."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    rows = list(read_raw(path, lambda names: [name for name in names if name != "kind"]))
    assert [list(row.values) for row in rows] == [["question", "answer"]] * len(ROWS)
    assert [(row.line, row.offset) for row in rows] == [(n + 1, -1) for n in range(len(ROWS))]


def test_a_parquet_file_with_flipped_bytes_fails_its_checksums(tmp_path: Path) -> None:
    """Where pages have checksums, wrong text never comes out."""
    path = tmp_path / "a.parquet"
    table = pa.table({"question": [f"question {n}" for n in range(500)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    write(path, content.replace(b"question 250", b"question 25X"))
    with pytest.raises(UnreadableFileError):
        read(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(min_size=1, max_size=5), VALUES, min_size=1, max_size=4)


def is_plain(row: dict[str, Any]) -> bool:
    """Return whether a row holds nothing that is refused on purpose."""
    return "\\u0000" not in json.dumps(row)


@given(
    rows=st.lists(OBJECTS.filter(is_plain), max_size=8),
    indent=st.sampled_from([None, 0, 1, "\t"]),
    ascii_only=st.booleans(),
)
def test_any_objects_come_back_from_an_array(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    indent: Any,
    ascii_only: bool,
) -> None:
    """With any content and any layout."""
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path = write(tmp_path_factory.getbasetemp() / "any.json", text)
    assert [row.values for row in read(path)] == rows


@given(
    rows=st.lists(
        st.lists(
            st.text(st.characters(exclude_characters="\0\r", codec="utf-8"), max_size=9),
            min_size=2,
            max_size=2,
        ),
        max_size=8,
    ),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_any_texts_come_back_from_csv(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], delimiter: str, end: str
) -> None:
    """Delimiters, quotes and newlines inside the texts included."""
    table = [dict(zip(("q", "a"), row, strict=True)) for row in rows]
    content = as_csv([{"q": "q", "a": "a"}, *table], delimiter, end)
    path = write(tmp_path_factory.getbasetemp() / "any.csv", content)
    assert [row.values for row in read(path)][1:] == table


@given(
    pieces=st.lists(
        st.sampled_from(
            [
                *(b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\n", b'{"q": 1}', b'"data"'),
                *(b'"q"', b"NaN", b"\xff", b"\0", b"1e9", b"\xef\xbb\xbf", b";", b"\t", b"-", b" "),
            ]
        )
        | st.binary(max_size=4),
        max_size=40,
    ),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".json.gz", ".csv.zst"]),
)
def test_no_bytes_make_a_reader_fail_or_hang(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], suffix: str
) -> None:
    """There are rows, bad rows or one error that the file is unreadable, and places rise."""
    content = b"".join(pieces)
    pack = next((PACK[end] for end in PACK if suffix.endswith(end)), bytes)
    path = write(tmp_path_factory.getbasetemp() / f"any{suffix}", pack(content))
    places = []
    with suppress(UnreadableFileError):
        for row in read_raw(path, list):
            places.append((row.offset, row.line))  # noqa: PERF401  # those before an error too
    assert places == sorted(places)
    assert all(0 <= offset < len(content) for offset, _ in places)
