"""Small files that unpack to very much: read in bounded memory and time, and the others go on."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qwen3ft.config import TrainingConfig
from qwen3ft.data.pipeline import DataPipeline
from qwen3ft.data.readers.open import read_raw
from qwen3ft.data.readers.raw import UnreadableFileError

BIG = "x" * 10_000_000

READ = """
import sys
from pathlib import Path
import pyarrow.compute, pyarrow.parquet
from qwen3ft.data.readers.open import read_raw
def peak():
    [line] = [x for x in Path("/proc/self/status").read_text().split("\\n") if "VmHWM" in x]
    return int(line.split()[1]) // 1024
before, reasons, flaw = peak(), [], ""
try:
    for row in read_raw(Path(sys.argv[1]), list, int(sys.argv[2])):
        reasons.append(row.reason)
except Exception as error:
    flaw = f"{type(error).__name__}: {error}"
print(peak() - before, len(reasons), ",".join(sorted(set(reasons))) or "good", flaw, sep="|")
"""


def read_in_child(path: Path, limit: int) -> tuple[int, int, str, str]:
    """Return MiB held beyond the start, number of rows, their reasons, and the error."""
    command = [sys.executable, "-c", READ, str(path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    held, count, reasons, flaw = done.stdout.strip().split("|")
    return int(held), int(count), reasons, flaw


def shared(count: int, value: str = BIG) -> pa.DictionaryArray:
    """Return `count` values that are stored once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def messages(count: int) -> pa.Array:
    """Return one row of so many messages that share their text."""
    message = pa.StructArray.from_arrays(
        [pa.array(["user"] * count), shared(count)], names=["role", "content"]
    )
    return pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), message)


SHARING: dict[str, Callable[[], pa.Array]] = {
    "a column": lambda: shared(60),
    "a structure": lambda: pa.StructArray.from_arrays([shared(60)], names=["text"]),
    "a list": lambda: pa.ListArray.from_arrays(pa.array(range(0, 121, 2), pa.int32()), shared(120)),
    "messages of one row": lambda: messages(1_000),
    "lists of lists": lambda: pa.ListArray.from_arrays(
        pa.array([0, 1], pa.int32()), messages(1_000)
    ),
}


@pytest.mark.parametrize(
    ("name", "store_schema"),
    [
        *((name, True) for name in SHARING),
        *(("a column", False), ("messages of one row", False)),  # one flat, one nested
        *(
            pytest.param(name, False, marks=pytest.mark.slow)
            for name in ("a structure", "a list", "lists of lists")
        ),
    ],
)
def test_values_that_rows_share_are_not_copied_for_each(
    tmp_path: Path, name: str, store_schema: bool
) -> None:
    """A file of 1 kB whose rows hold 10 MB each, the same; rows may hold 4 MiB."""
    path = tmp_path / "a.parquet"
    table = pa.table({"question": SHARING[name]()})
    pq.write_table(table, path, compression="zstd", store_schema=store_schema)
    assert path.stat().st_size < 4_000
    held, count, reasons, flaw = read_in_child(path, limit=4 * 2**20)
    assert (count, reasons, flaw) == (table.num_rows, "row_too_large", "")
    assert held < 100


def test_rows_that_fit_are_read_until_the_file_has_given_enough(tmp_path: Path) -> None:
    """Each of 60 rows may be as large as that; six of them are 64 MiB, and the rest is not read."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": shared(60)}), path, compression="zstd")
    held, count, reasons, flaw = read_in_child(path, limit=16 * 2**20)
    assert (count, reasons) == (6, "good")
    assert "unpack to more than 64 MiB" in flaw
    assert held < 300


def test_usual_sharing_is_read_whole(tmp_path: Path) -> None:
    """Text, categories and nested messages with a dictionary, none, or one that was given up."""
    rows = [
        {
            "question": f"question {n}",
            "kind": ("a", "b", None)[n % 3],
            "messages": [{"role": ("user", "system")[n % 2], "content": f"é{n % 50}"}] * (n % 3),
        }
        for n in range(5_000)
    ]
    path = tmp_path / "a.parquet"
    for options in ({}, {"use_dictionary": False}, {"dictionary_pagesize_limit": 1_000}):
        for table in (
            pa.Table.from_pylist(rows),
            pa.Table.from_pylist(rows).set_column(
                1, "kind", pa.array([row["kind"] for row in rows]).dictionary_encode()
            ),
        ):
            pq.write_table(table, path, row_group_size=1_700, **options)
            assert [row.values for row in read_raw(path, list)] == rows


def test_pages_that_take_too_much_memory_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """Nine columns, each with one page of 30 MiB of zeros; the row group before it comes out."""
    path, column = tmp_path / "a.parquet", pa.array(["0" * (30 * 2**20)])
    big = pa.table({f"c{n}": column for n in range(9)})
    small = pa.table({f"c{n}": ["fine"] for n in range(9)})
    options = {"compression": "zstd", "use_dictionary": False, "data_page_size": 2**30}
    options["write_statistics"] = False
    with pq.ParquetWriter(path, big.schema, **options) as writer:
        writer.write_table(small)
        writer.write_table(big)
    held, count, reasons, flaw = read_in_child(path, limit=16 * 2**20)
    assert (count, reasons) == (1, "good")
    assert "row group 1 take 270 MiB at once, and may take 256" in flaw
    assert held < 50


def nested_type(levels: int) -> pa.DataType:
    """Return structures inside structures."""
    kind: pa.DataType = pa.int32()
    for _ in range(levels):
        kind = pa.struct([("a", kind)])
    return kind


SHAPES: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "deep": (lambda: pa.table({"q": pa.nulls(1, nested_type(2_000))}), "nested more than 100"),
    "wide": (lambda: pa.table({f"c{n}": [1] for n in range(10_001)}), "10,002 columns"),
    "long": (lambda: pa.table({"q": pa.nulls(1_000_000, pa.string())}), "more than 200,"),
    "one long list": (
        lambda: pa.table({"q": pa.array([np.zeros(20_000_000, np.int8)])}),
        "20,000,000 values",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_of_a_hostile_shape_is_refused(tmp_path: Path, name: str) -> None:
    """Its schema is deep or wide, or it has a million rows in a few bytes."""
    make, reason = SHAPES[name]
    path = tmp_path / "a.parquet"
    pq.write_table(make(), path, store_schema=False)
    with pytest.raises(UnreadableFileError, match=reason):
        list(read_raw(path, list))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"PAR1" + content[-8:],
        lambda content: content[:-8] + b"\xff\xff\xff\x7fPAR1",
        lambda content: content[:-8] + b"\0\0\0\0PAR1",
        lambda content: content[: len(content) // 2] + b"PAR1",
        lambda content: b"PAR1",
        lambda content: b"",
        lambda content: content[:4] + b"\xff" * 64 + content[68:],
    ],
)
def test_a_parquet_file_that_lies_about_itself_is_unreadable(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    """Lengths of footers and headers of pages that lead nowhere."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"q": [f"question {n}" for n in range(500)]}), path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UnreadableFileError):
        list(read_raw(path, list))


def packed(content: bytes, times: int, codec: str) -> bytes:
    """Return `content` many times, as gzip members or zstandard frames."""
    if codec == "gz":
        return gzip.compress(content) * times
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes()) * times


FILLERS = {
    "zeros": (b"\0" * 2**20, "MiB"),
    "newlines": (b"\n" * 2**20, "MiB"),
    "one value a line": (b"1\n" * 2**19, "rows"),
    "one row": (b'{"question": "q", "answer": "a"}\n' * 2**15, "rows"),
    "spaces": (b" " * 2**20, "MiB"),
}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("zeros", "jsonl.gz"),
        ("zeros", "csv.zst"),
        ("newlines", "jsonl.zst"),
        ("newlines", "csv.gz"),
        ("one value a line", "jsonl.zst"),
        ("one row", "jsonl.zst"),
        ("spaces", "json.gz"),
    ],
)
@pytest.mark.timeout(120)
def test_a_compressed_file_that_gives_too_much_is_left(
    tmp_path: Path, name: str, suffix: str
) -> None:
    """128 MiB of the same: reading ends before, and the error has the number."""
    filler, unit = FILLERS[name]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(packed(b"question,answer\n" + filler, 128, suffix.partition(".")[2]))
    with pytest.raises(UnreadableFileError, match=f"unpack to more than [0-9,]+ {unit}"):
        for _ in read_raw(path, list):
            pass


def test_a_bomb_among_the_files_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    """Two bombs, and one file of rows: the rows are there, and the quarantine names the bombs."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(30)]
    (data / "a.jsonl.gz").write_bytes(packed(b"\0" * 2**20, 128, "gz"))
    table = pa.table({"question": shared(60), "answer": ["a"] * 60})
    pq.write_table(table, data / "b.parquet", compression="zstd")
    (data / "c.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = TrainingConfig(
        model_name="embedded",
        data_paths=(str(data),),
        cache_dir=str(tmp_path / "cache"),
        max_bad_fraction=1.0,
    )
    found = Counter(row["file"] for row in DataPipeline(config).load_qa_data_from_files())
    assert found[str(data / "c.jsonl")] == 30
    assert found[str(data / "b.parquet")] == 6
    [quarantine] = (tmp_path / "cache").rglob("quarantine.jsonl")
    bad = [json.loads(line) for line in quarantine.read_text(encoding="utf-8").splitlines()]
    unreadable = {entry["file"]: entry["excerpt"] for entry in bad if entry["line"] == 0}
    assert set(unreadable) == {str(data / "a.jsonl.gz"), str(data / "b.parquet")}
    assert all("unpack to more than" in reason for reason in unreadable.values())
