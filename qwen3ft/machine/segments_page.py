"""A page that shows a person what a GPU's memory was full of: one HTML file, no scripts, no links.

Every segment is a bar as long as it is large, its blocks in the order of their addresses, coloured
by state; the pointer tells a block's size. The page is bounded: the largest segments are drawn, and
blocks too narrow to be seen are drawn together, in the colour of most of their bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from qwen3ft.machine.segments import (
    IN_USE,
    UNUSED,
    WAITING,
    Block,
    Live,
    Segment,
    largest_in_use,
    totals,
)

COLOURS = {IN_USE: "#1f77b4", WAITING: "#ff7f0e", UNUSED: "#d9d9d9"}
SEGMENTS_DRAWN = 60
BLOCKS_LISTED = 40
_WIDTH, _BAR_HEIGHT, _ROW_HEIGHT, _LABEL_WIDTH = 1000, 16, 22, 240
_NARROWEST = 0.75  # pixels

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: 2px 12px 2px 0; text-align: right }
td:last-child, th:last-child { text-align: left }
h2 { margin-top: 1.6em }
.key { display: inline-block; width: 1em; height: 1em; margin: 0 .3em 0 1em }
"""


def segments_page(
    title: str, why: str, segments: Sequence[Segment], peak: Sequence[Live] = ()
) -> str:
    """The page.

    Args:
        title: The headline.
        why: What happened, in words; shown below it.
        segments: The largest first, as `read_segments` gives them.
        peak: From `live_at_peak`, if there was a history.
    """
    keys = "".join(
        f'<span class="key" style="background:{colour}"></span>{state}'
        for state, colour in COLOURS.items()
    )
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style>",
            f"<h1>{escape(title)}</h1><p>{escape(why)}</p>",
            _totals_table(segments),
            f"<h2>Segments by size</h2><p>{keys}</p>",
            _drawing(segments),
            *_listing("Largest blocks in use", largest_in_use(segments, BLOCKS_LISTED)),
            *_peak_listing(peak),
            "</html>",
        ]
    )


def size_text(size_bytes: int) -> str:
    """A size as a person reads it."""
    if size_bytes >= 2**30:
        return f"{size_bytes / 2**30:.2f} GB"
    return f"{size_bytes / 2**20:.1f} MB" if size_bytes >= 2**20 else f"{size_bytes / 2**10:.1f} KB"


def _totals_table(segments: Sequence[Segment]) -> str:
    numbers = totals(segments)
    rows = [
        ("held by the allocator", size_text(numbers["held_bytes"])),
        ("in use by tensors", size_text(numbers["in_use_bytes"])),
        ("waiting for a stream", size_text(numbers["waiting_bytes"])),
        ("unused", size_text(numbers["unused_bytes"])),
        ("largest unused piece", size_text(numbers["largest_unused_bytes"])),
        ("segments, blocks", f"{numbers['segments']:,}, {numbers['blocks']:,}"),
    ]
    return "<table>" + "".join(f"<tr><td>{n}<td>{v}" for n, v in rows) + "</table>"


def _drawing(segments: Sequence[Segment]) -> str:
    drawn, rest = segments[:SEGMENTS_DRAWN], segments[SEGMENTS_DRAWN:]
    scale = _WIDTH / max((segment.size_bytes for segment in drawn), default=1)
    rows = []
    for index, segment in enumerate(drawn):
        y = index * _ROW_HEIGHT
        rows.append(
            f'<text x="0" y="{y + 12}" font-size="11">{size_text(segment.size_bytes)}, '
            f"{escape(segment.kind)}, {len(segment.blocks):,} blocks</text>"
        )
        rows += [
            f'<rect x="{_LABEL_WIDTH + x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR_HEIGHT}" '
            f'fill="{COLOURS[state]}" stroke="#fff" stroke-width=".3">'
            f"<title>{escape(told)}</title></rect>"
            for x, width, state, told in _bars(segment.blocks, scale)
        ]
    height = max(1, len(drawn)) * _ROW_HEIGHT
    left_out = (
        f"<p>{len(rest):,} smaller segments of {size_text(sum(s.size_bytes for s in rest))} "
        "in all are not drawn.</p>"
        if rest
        else ""
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LABEL_WIDTH + _WIDTH}" '
        f'height="{height}">{"".join(rows)}</svg>{left_out}'
    )


def _bars(blocks: Sequence[Block], scale: float) -> Iterator[tuple[float, float, str, str]]:
    """(x, width, state, words) of each bar; neighbours that are too narrow become one."""
    narrow: list[Block] = []

    def together() -> Iterator[tuple[float, float, str, str]]:
        if narrow:
            by_state: Counter[str] = Counter()
            for block in narrow:
                by_state[block.state] += block.size_bytes
            size = by_state.total()
            told = f"{len(narrow):,} small blocks, {size_text(size)}: " + ", ".join(
                f"{size_text(amount)} {state}" for state, amount in by_state.most_common()
            )
            x = narrow[0].offset_bytes * scale
            yield x, size * scale, by_state.most_common(1)[0][0], told
            narrow.clear()

    for block in blocks:
        width = block.size_bytes * scale
        if width < _NARROWEST:
            narrow.append(block)
            if sum(item.size_bytes for item in narrow) * scale >= _NARROWEST:
                yield from together()
            continue
        yield from together()
        told = f"{size_text(block.size_bytes)} {block.state}"
        yield (
            block.offset_bytes * scale,
            width,
            block.state,
            told + (f"\n{block.where}" if block.where else ""),
        )
    yield from together()


def _listing(headline: str, blocks: Sequence[Block]) -> Iterator[str]:
    yield f"<h2>{headline}</h2>"
    if not any(block.where for block in blocks):
        yield "<p>Where they were allocated is recorded with <code>memory_history: true</code>.</p>"
    yield "<table><tr><th>size<th>requested<th>where"
    for block in blocks:
        yield (
            f"<tr><td>{size_text(block.size_bytes)}<td>{size_text(block.requested_bytes)}"
            f"<td>{escape(block.where)}"
        )
    yield "</table>"


def _peak_listing(peak: Sequence[Live]) -> Iterator[str]:
    """What was alive at the peak, summed by the line that allocated it."""
    if not peak:
        return
    by_where: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for live in peak:
        by_where[live.where or "before the history begins"] += live.size_bytes
        counts[live.where or "before the history begins"] += 1
    yield f"<h2>Alive at the peak of the history: {size_text(by_where.total())}</h2>"
    yield "<table><tr><th>size<th>blocks<th>where"
    for where, size in by_where.most_common(BLOCKS_LISTED):
        yield f"<tr><td>{size_text(size)}<td>{counts[where]:,}<td>{escape(where)}"
    yield "</table>"
