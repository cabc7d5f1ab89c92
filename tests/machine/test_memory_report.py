"""The report on what memory was full of, from snapshots in the form that torch documents."""

from __future__ import annotations

import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qwen3ft.machine.memory_report import Mapping, mapping_class, read_resident, resident_text
from qwen3ft.machine.memory_snapshot import PeakKeeper, write_report, write_segments
from qwen3ft.machine.process_memory import MemoryReading
from qwen3ft.machine.segments import (
    IN_USE,
    UNUSED,
    WAITING,
    as_json,
    largest_in_use,
    live_at_peak,
    read_segments,
    totals,
    where_of,
)
from qwen3ft.machine.segments_page import SEGMENTS_DRAWN, segments_page, size_text

MIB = 2**20
STEP = {"filename": "/srv/qwen3ft/fused/step.py", "line": 12, "name": "forward"}
TORCH = {"filename": "/lib/torch/nn/functional.py", "line": 1, "name": "linear"}


def make_block(size_mib: float, state: str = "active_allocated", **values: Any) -> dict[str, Any]:
    size = int(size_mib * MIB)
    return {"size": size, "requested_size": size - 1, "state": state, "frames": [], **values}


def make_segment(address: int, *blocks: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {
        "address": address,
        "total_size": sum(block["size"] for block in blocks),
        "stream": 0,
        "segment_type": "large",
        "is_expandable": False,
        "blocks": list(blocks),
        **values,
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


SNAPSHOT = [
    make_segment(0, make_block(2), make_block(18, "inactive")),
    make_segment(
        1000 * MIB,
        make_block(100, frames=[TORCH, STEP]),
        make_block(30, "active_awaiting_free"),
        make_block(70, "inactive"),
        is_expandable=True,
    ),
]


def test_a_snapshot_is_read_as_torch_documents_it() -> None:
    """Sizes, states and places of every block; the largest segment first."""
    large, small = read_segments(SNAPSHOT)
    assert (large.size_bytes, large.kind) == (200 * MIB, "large, grows")
    assert [(b.offset_bytes // MIB, b.size_bytes // MIB, b.state) for b in large.blocks] == [
        (0, 100, IN_USE),
        (100, 30, WAITING),
        (130, 70, UNUSED),
    ]
    assert large.blocks[0].where == "fused/step.py:12 forward"
    assert small.bytes_of(IN_USE) == 2 * MIB
    assert totals((large, small)) == {
        "held_bytes": 220 * MIB,
        "in_use_bytes": 102 * MIB,
        "waiting_bytes": 30 * MIB,
        "unused_bytes": 88 * MIB,
        "largest_unused_bytes": 70 * MIB,
        "segments": 2,
        "blocks": 5,
    }
    assert [block.size_bytes // MIB for block in largest_in_use((large, small), 1)] == [100]


def test_where_a_block_is_from_leaves_torchs_own_lines_out() -> None:
    """The nearest line of ours first; four at most; nothing without a history."""
    caller = {"filename": "/srv/qwen3ft/trainer.py", "line": 99, "name": "training_step"}
    assert where_of([TORCH, STEP, {"filename": "x.cpp"}, caller]) == (
        "fused/step.py:12 forward < qwen3ft/trainer.py:99 training_step"
    )
    assert where_of([STEP] * 9).count("<") == 3
    assert where_of([]) == ""


def test_the_json_is_bounded_and_its_sums_are_right() -> None:
    """Of 5,000 blocks the 100 largest are kept, also where many are of one size."""
    blocks = [make_block(1 + index % 7) for index in range(5000)]
    segments = read_segments([make_segment(0, *blocks[:2500]), make_segment(2**40, *blocks[2500:])])
    content = as_json(segments, (), most_blocks=100)
    kept = [block for segment in content["segments"] for block in segment["blocks"]]
    assert len(kept) == 100
    assert {block["size_bytes"] for block in kept} == {7 * MIB}
    for told, segment in zip(content["segments"], segments, strict=True):
        told_bytes = sum(block["size_bytes"] for block in told["blocks"])
        assert told_bytes + told["bytes_left_out"] == segment.size_bytes
        assert len(told["blocks"]) + told["blocks_left_out"] == 2500


def test_the_peak_is_found_in_the_history() -> None:
    """Going back from the present: what was alive when most was, and where it came from."""

    def event(action: str, addr: int, size_mib: int, line: int) -> dict[str, Any]:
        frames = [{"filename": "/srv/qwen3ft/a.py", "line": line, "name": "f"}]
        return {"action": action, "addr": addr, "size": size_mib * MIB, "frames": frames}

    trace = [
        event("alloc", 5000, 40, 1),
        event("alloc", 6000, 200, 2),
        event("free_requested", 6000, 200, 3),
        event("free_completed", 6000, 200, 3),
        event("alloc", 6000, 10, 4),
        event("free_completed", 6000, 10, 5),
        {"action": "oom", "size": 1, "device_free": 0, "frames": []},
    ]
    weights = make_block(100, frames=[STEP])
    held = read_segments([make_segment(0, weights), make_segment(5000, make_block(40))])
    peak = live_at_peak(held, trace)
    assert sorted((live.size_bytes // MIB, live.where) for live in peak) == [
        (40, "qwen3ft/a.py:1 f"),
        (100, "fused/step.py:12 forward"),
        (200, "qwen3ft/a.py:2 f"),
    ]
    assert live_at_peak(held, []) == ()


def test_the_page_is_self_contained_bounded_and_well_formed() -> None:
    """Thousands of blocks are at most two bars a pixel; no script, no link, text is escaped."""
    many = [make_segment(i * 2**33, make_block(2)) for i in range(SEGMENTS_DRAWN + 40)]
    tiny = make_segment(
        2**50, *[make_block(0.01, s) for s in ("inactive", "active_allocated")] * 9000
    )
    page = segments_page("Memory", "<b> & more", read_segments([*many, tiny, *SNAPSHOT]))
    assert len(page) < 1_000_000
    assert page.count("<rect") < 2 * 1000 + 3 * SEGMENTS_DRAWN
    assert not re.search(r"<script|<link|href|src=|url\(|@import", page)
    assert "&lt;b&gt; &amp; more" in page
    assert "43 smaller segments of" in page
    assert "fused/step.py:12 forward" in page
    assert _balanced(page) == []
    empty = segments_page("Memory", "", ())
    assert _balanced(empty) == []


def test_bars_of_a_segment_cover_it_without_gaps() -> None:
    """Widths add up to the segment's, however small its blocks are."""
    blocks = [
        make_block(0.02 * (1 + i % 50), ("inactive", "active_allocated")[i % 2])
        for i in range(3000)
    ]
    page = segments_page("Memory", "", read_segments([make_segment(0, *blocks)]))
    bars = re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', page)
    assert sum(float(width) for _, width in bars) == pytest.approx(1000, abs=0.01 * len(bars))
    ends = [float(x) + float(width) for x, width in bars]
    starts = [float(x) for x, _ in bars[1:]]
    assert starts == pytest.approx(ends[:-1], abs=0.02)


def test_a_snapshot_becomes_two_files_without_pickle(tmp_path: Path) -> None:
    """The JSON holds what the page shows; secrets in the reason are masked."""
    snapshot = {"segments": SNAPSHOT, "device_traces": [[], []]}
    write_segments(tmp_path, f"token hf_{'x' * 30} ran out", snapshot)
    assert names(tmp_path) == {"segments.html", "segments.json.gz"}
    content = json.loads(gzip.decompress((tmp_path / "segments.json.gz").read_bytes()))
    assert content["totals"]["held_bytes"] == 220 * MIB
    assert content["segments"][0]["blocks"][0]["where"] == "fused/step.py:12 forward"
    assert "hf_xxx" not in (tmp_path / "segments.html").read_text()


def test_resident_memory_is_told_by_class() -> None:
    """Sums of classes, and the largest mappings by name."""
    mappings = [
        Mapping("[anon]", 300 * MIB),
        Mapping("[heap]", 50 * MIB),
        Mapping("/lib/libtorch_cpu.so", 120 * MIB),
        Mapping("/lib/libc.so.6", 2 * MIB),
        Mapping("/data/rows.arrow", 40 * MIB),
    ]
    text = resident_text({"rss": 512 * MIB}, mappings)
    assert "512.0 MiB" in text
    assert re.search(r"122\.0 MiB +libraries", text)
    assert re.search(r"300\.0 MiB +anonymous", text)
    assert re.search(r"120\.0 MiB +/lib/libtorch_cpu.so", text)
    assert mapping_class("[stack]") == "stacks"
    assert mapping_class("/dev/shm/x") == "devices and shared memory"
    assert mapping_class("[vdso]") == "kernel"
    assert "rss" in read_resident()


def test_a_report_on_a_cpu_is_a_text_and_never_in_the_way(tmp_path: Path) -> None:
    """A folder that cannot be made costs the report alone."""
    write_report(tmp_path / "memory", "Resident memory is 2.00 GB, the budget 1.00 GB.")
    assert names(tmp_path / "memory") == {"resident.txt"}
    text = (tmp_path / "memory" / "resident.txt").read_text()
    assert text.startswith("Resident memory is 2.00 GB")
    (tmp_path / "file").write_text("")
    write_report(tmp_path / "file" / "memory", "x")
    assert (tmp_path / "file").read_text() == ""


def test_the_peak_is_on_disk_as_soon_as_it_is_known(tmp_path: Path) -> None:
    """The step that set it and all counters; a lower reading leaves it alone."""
    keeper = PeakKeeper(tmp_path / "memory", "cuda")
    for step, peak in ((1, 100), (2, 300), (3, 305), (4, 310)):
        keeper.see(
            MemoryReading(
                step, 5, peak_allocated_bytes=peak, reserved_bytes=400, inactive_bytes=100
            )
        )
        if step == 3:
            assert json.loads(keeper.path.read_text())["step"] == 2  # under 2 % more
    told = json.loads(keeper.path.read_text())
    assert (told["step"], told["peak_allocated_bytes"]) == (4, 310)
    assert told["fragmentation_share"] == 0.25


@pytest.mark.gpu
def test_on_a_gpu_the_report_shows_what_is_alive(tmp_path: Path) -> None:
    """A tensor of 64 MiB is the largest block in use, with its line where there is a history."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from qwen3ft.machine.memory_snapshot import record_history

    record_history()
    kept = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    spike = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")
    del spike
    write_report(tmp_path, "a test")
    torch.cuda.memory._record_memory_history(None)
    wanted = {"resident.txt", "summary.txt", "segments.json.gz", "segments.html"}
    assert names(tmp_path) == wanted
    content = json.loads(gzip.decompress((tmp_path / "segments.json.gz").read_bytes()))
    blocks = [block for segment in content["segments"] for block in segment["blocks"]]
    largest = max((b for b in blocks if b["state"] == IN_USE), key=lambda b: b["size_bytes"])
    assert largest["size_bytes"] == kept.numel()
    assert "test_memory_snapshot.py" in largest["where"]
    assert content["peak_bytes"] >= 320 * MIB


class _Balance(HTMLParser):
    """Collects elements of the drawing that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("svg", "rect", "text", "title", "table", "style", "h1", "h2"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def _balanced(page: str) -> list[str]:
    parser = _Balance()
    parser.feed(page)
    return parser.open


def test_sizes_read_as_a_person_reads_them() -> None:
    """GB, MB and KB of powers of two."""
    assert [size_text(n) for n in (2**30, 3 * 2**19, 512)] == ["1.00 GB", "1.5 MB", "0.5 KB"]
