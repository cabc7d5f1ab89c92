"""Text files in other encodings than UTF-8: recognised and read, or refused with what to do."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.data_stage import prepare, read_lines

from flows.cli.views.data import show_manifest
from qwen3ft.data.readers.encodings import FLAW, SAMPLE_BYTES, recognise
from qwen3ft.data.readers.open import read_raw
from qwen3ft.data.readers.raw import RawRow, UnreadableFileError
from qwen3ft.records.data import DataChange
from qwen3ft.report.data_section import data_markdown

CHINESE = [
    (f"第{n}号仓库的阀门在什么压力下打开？", f"它在{n}千帕时打开，因为“安全”最重要。")
    for n in range(9)
]
# Each encoding with texts that it is for.
TEXTS = {
    "gbk": CHINESE,
    "gb18030": [(question, f"{answer}\n㐀𠮷😀 “{question}”") for question, answer in CHINESE],
    "big5": [
        ("請問台北到高雄的火車票多少錢？", "高鐵票大約一千五百元，車程約兩小時。"),
        ("什麼是機器學習？", "機器學習是人工智慧的一個分支，研究電腦怎樣學習。"),
    ],
    "shift_jis": [
        ("東京から京都までどのくらいかかりますか？", "新幹線で約二時間です。"),
        ("機械学習とは何ですか？", "コンピュータがデータから学ぶ仕組みのことです。"),
    ],
    "utf-16": [*CHINESE, ("Naïve “quotes”", "😀 fine")],
    "utf-16-le": CHINESE,
    "utf-16-be": [("What is it?", "It is a test."), *CHINESE],
    "utf-32": CHINESE,
}
NAMES = {
    "gbk": "GB18030",
    "gb18030": "GB18030",
    "big5": "Big5",
    "shift_jis": "Shift-JIS",
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16",
    "utf-32": "UTF-32",
}


def as_csv(rows: list[tuple[str, str]], delimiter: str = ",") -> str:
    """Return rows under a line of names, with line ends of Windows."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([("question", "答案"), *rows])
    return text.getvalue()


def every_format(rows: list[tuple[str, str]]) -> dict[str, str]:
    """Return the text of files that hold `rows`."""
    objects = [{"question": question, "答案": answer} for question, answer in rows]
    lines = [json.dumps(values, ensure_ascii=False) for values in objects]
    return {
        "a.csv": as_csv(rows),
        "excel.csv": as_csv(rows, "\t"),  # its "Unicode text"
        "a.tsv": as_csv(rows, "\t"),
        "stated.csv": "sep=;\r\n" + as_csv(rows, ";"),
        "a.jsonl": "\n".join(lines) + "\n",
        "array.json": json.dumps(objects, ensure_ascii=False),
        "pretty.json": json.dumps(objects, ensure_ascii=False, indent=2),
        "inside.json": json.dumps({"n": 1, "data": objects}, ensure_ascii=False),
    }


def read_noted(path: Path) -> tuple[list[RawRow], list[str]]:
    """Return all rows of a file, and what is said of it."""
    notes: list[str] = []
    return list(read_raw(path, list, note=notes.append)), list(dict.fromkeys(notes))


def outcome(path: Path) -> list[str]:
    """Return the reason, or else the first value, of each row."""
    return [row.reason or next(iter(row.values.values())) for row in read_noted(path)[0]]


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_file_in_another_encoding_is_read_and_said(
    tmp_path: Path, encoding: str, packed: str
) -> None:
    """In every format; lines and offsets are those of the file itself."""
    rows = TEXTS[encoding]
    for name, text in every_format(rows).items():
        if encoding == "utf-16-be" and name == "pretty.json":
            continue  # without a mark, its first line is too short to tell
        content = text.encode(encoding)
        path = tmp_path / (name + packed)
        path.write_bytes(gzip.compress(content) if packed else content)
        found, notes = read_noted(path)
        assert [tuple(row.values.values()) for row in found] == rows, name
        assert [list(row.values) for row in found] == [["question", "答案"]] * len(rows)
        assert notes == [f"read as {NAMES[encoding]}"], name
        start = "utf-16-le" if content.startswith(b"\xff\xfe") else encoding
        for row, (question, _) in zip(found, rows, strict=True):
            behind = content[row.offset :].decode("utf-32-le" if "32" in encoding else start)
            assert behind.lstrip('{"\n question:').startswith(question[:5]), name
            before = text[: -len(behind)] if behind else text
            assert before.count("\n") + 1 == row.line


@pytest.mark.parametrize("order", range(3))
def test_the_decision_does_not_depend_on_the_order_of_lines(order: int) -> None:
    """Nor on how many of them are ASCII alone."""
    lines = [f"{q},{a}".encode("gbk") for q, a in CHINESE] + [b"plain,text"] * 300
    random.Random(order).shuffle(lines)
    assert recognise(b"\n".join(lines)) == "gb18030"


def test_what_follows_and_is_in_no_or_another_encoding_costs_its_own_row(tmp_path: Path) -> None:
    """Behind all that was looked at: broken bytes, and lines of UTF-8, which GBK could read."""
    good = [f"{q}{n},{a}\n".encode("gbk") for n in range(2000) for q, a in CHINESE]
    assert sum(map(len, good)) > SAMPLE_BYTES
    bad = [b"abc\xff\xffdef,x\n", "机器学习是什么,它是一门科学\n".encode(), b"\x81\n"]
    path = tmp_path / "a.csv"
    content = b"question,answer\n" + b"".join([*good, bad[0], good[0], *bad[1:], good[1]])
    path.write_bytes(content)
    rows, notes = read_noted(path)
    flawed = [row for row in rows if row.reason]
    assert [row.reason for row in flawed] == ["invalid_gb18030"] * 2 + ["wrong_column_count"]
    assert len(rows) == len(good) + 5
    assert notes == ["read as GB18030"]
    for row, line in zip(flawed, bad, strict=True):
        assert content[row.offset :].startswith(line)
    assert "abc" in flawed[0].text


@given(
    texts=st.lists(
        st.sampled_from(["机器学习是什么？", "what, is it", "café", "plain"]), min_size=4
    ),
    broken=st.binary(min_size=1, max_size=40).filter(lambda line: b"\n" not in line),
    place=st.integers(0, 3),
    suffix=st.sampled_from([".jsonl", ".csv", ".json"]),
)
def test_random_bytes_in_a_utf8_file_never_change_its_encoding(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    broken: bytes,
    place: int,
    suffix: str,
) -> None:
    """The other rows come out unchanged, and those lines are refused or what they are."""
    rows = [json.dumps({"q": text}, ensure_ascii=False).encode() for text in texts]
    if suffix == ".csv":
        rows = [f'"{text}"'.encode() for text in texts]
    rows.insert(place, broken)
    content = b"[\n" + b",\n".join(rows) + b"\n]" if suffix == ".json" else b"\n".join(rows)
    path = tmp_path_factory.getbasetemp() / f"broken{suffix}"
    path.write_bytes(b"q\n" + content if suffix == ".csv" else content)
    notes: list[str] = []
    found = []
    try:
        for row in read_raw(path, list, note=notes.append):
            found += [] if row.reason else list(row.values.values())
    except UnreadableFileError:
        assert suffix == ".json"  # the broken line closes the list
        return
    assert {*texts} <= {*map(str, found)} or b'"' in broken or b"\r" in broken
    assert not [note for note in notes if not note.startswith("read as UTF-8,")]
    assert FLAW not in "".join(map(str, found))


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 8))
def test_bytes_by_chance_are_no_language(seed: int, count: int) -> None:
    """Even where nothing else is beyond ASCII; the same two bytes five times may be one."""
    random = Random(seed)
    lines = [random.randbytes(random.randint(1, 200)) for _ in range(count)]
    sample = b"question,answer\nwhat is it,a test\n" * 9 + b"\n".join(lines)
    assert recognise(sample) in ("utf-8", "")


FOREIGN = {
    "cp1252": [
        ("Où est le café ?", "Le café est à côté de l'hôtel, près du théâtre."),
        ("Qu'est-ce que l'apprentissage ?", "L'apprentissage automatique est un champ d'étude."),
    ],
    "cp1251": [("Что такое машинное обучение?", "Раздел искусственного интеллекта.")],
    "cp949": [("기계 학습이란 무엇입니까?", "기계 학습은 인공지능의 한 분야입니다.")],
    "euc-jp": [("機械学習とは何ですか？", "データから学ぶ仕組みのことです。")],
}


@pytest.mark.parametrize("encoding", FOREIGN)
@pytest.mark.parametrize("name", ["a b.csv", "a.jsonl", "a.csv.gz"])
def test_an_encoding_that_is_not_told_for_sure_is_refused_with_its_conversion(
    tmp_path: Path, encoding: str, name: str
) -> None:
    """The command of the message makes the file readable."""
    rows = FOREIGN[encoding] * 5
    content = every_format(rows)["a.jsonl" if "jsonl" in name else "a.csv"]
    data = content.replace("答案", "answer").encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UnreadableFileError, match=r"iconv -f [\w-]+ -t UTF-8") as caught:
        read_noted(tmp_path / name)
    command = str(caught.value).partition("convert it: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    found, notes = read_noted(tmp_path / f"utf8-{name.removesuffix('.gz')}")
    assert [tuple(row.values.values()) for row in found] == rows
    assert notes == []


def test_a_few_lines_in_another_encoding_stay_bad_rows_and_the_command_is_noted(
    tmp_path: Path,
) -> None:
    """As long as most lines are UTF-8, or ASCII, the others are read."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"q,a\n" + b"plain,text\n" * 9 + "où,café\n".encode("cp1252") + b"x,y\n")
    assert outcome(path) == ["plain"] * 9 + ["invalid_utf8", "x"]
    [note] = read_noted(path)[1]
    assert note.startswith("read as UTF-8, which not all of it is")
    assert "iconv -f CP125" in note


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfeq,a\nx,y\n",
        b"q,a\nx\0,y\nu,v\n",
        b"\xef\xbb\xbfq,a\nx,y\n",
        "q,a\n你,好\n".encode(),
        b"q,a\nl\xe9a,b\n",
    ],
)
def test_what_only_looks_like_another_encoding_is_utf8(tmp_path: Path, content: bytes) -> None:
    """A mark of UTF-16 before plain bytes, NULs, a mark of UTF-8, a letter of Latin-1."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert not [note for note in read_noted(path)[1] if not note.startswith("read as UTF-8,")]


def test_the_encoding_is_shown_wherever_the_file_is(tmp_path: Path) -> None:
    """On the screen, on the page, in the manifest; bad rows have their byte and reason."""
    path = tmp_path / "问答.csv"
    lines = [f"第{n}个问题是什么意思？,这是第{n}个回答\n".encode("gbk") for n in range(40)]
    content = "问题,答案\n".encode("gbk") + b"".join([*lines, b"\xff\xff,x\n"])
    path.write_bytes(content)
    manifest = prepare(tmp_path, str(path), max_bad_fraction=0.1)
    assert manifest.sources[0].notes == ("read as GB18030",)
    assert manifest.chinese_rows == 40
    screen = Console(file=io.StringIO(), width=200)
    show_manifest(screen, manifest)
    assert "41 rows for train; read as GB18030" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "read as GB18030" in data_markdown(manifest, DataChange())
    [bad] = read_lines(Path(str(manifest.quarantine_path)))
    assert (bad["line"], bad["reason"]) == (42, "invalid_gb18030")
    assert bad["offset"] == content.index(b"\xff\xff")


HELD = """
import sys
from pathlib import Path
from qwen3ft.data.readers.open import read_raw
import pyarrow
def peak():
    [line] = [x for x in Path("/proc/self/status").read_text().split("\\n") if "VmHWM" in x]
    return int(line.split()[1]) // 1024
before = peak()
reasons = [row.reason for row in read_raw(Path(sys.argv[1]), list, 2**20)]
print(peak() - before, reasons)
"""


def test_a_large_text_in_another_encoding_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """64 MB of one row: what is kept to tell offsets does not grow with it."""
    path = tmp_path / "a.csv.gz"
    filler = "机器学习".encode("gbk") * 2**17
    with pa.CompressedOutputStream(str(path), "gzip") as out:
        out.write("问题,答案\n什么是机器学习,它是一门科学\n".encode("gbk"))
        for _ in range(64):
            out.write(filler)
        out.write("\n什么是机器,一门科学\n".encode("gbk"))
    done = subprocess.run(
        [sys.executable, "-c", HELD, str(path)], capture_output=True, text=True, check=True
    )
    held, _, reasons = done.stdout.partition(" ")
    assert reasons.strip() == str(["", "row_too_large", ""])
    assert int(held) < 80, held
