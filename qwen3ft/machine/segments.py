"""What torch's allocator holds on a GPU, piece by piece, as small records: pure, no torch.

A segment is memory that the allocator got from the driver; its blocks are in use by tensors,
waiting for a stream, or unused. `read_segments` takes what `torch.cuda.memory_snapshot()` gives;
`live_at_peak` finds, in the allocator's history, what was alive when most was. Both take any
number of blocks; `as_json` is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IN_USE, WAITING, UNUSED = "in use", "waiting for a stream", "unused"
_STATES = {"active_allocated": IN_USE, "active_awaiting_free": WAITING}
_PENDING = "active_pending_free"  # what some versions call the second

MOST_BLOCKS_KEPT = 20_000
FRAMES_TOLD = 4


@dataclass(frozen=True)
class Block:
    """A piece of a segment."""

    offset_bytes: int
    size_bytes: int
    requested_bytes: int
    state: str
    where: str = ""


@dataclass(frozen=True)
class Segment:
    """Memory got from the driver in one piece; blocks are in the order of their addresses."""

    address: int
    size_bytes: int
    kind: str
    stream: int
    blocks: tuple[Block, ...]

    def bytes_of(self, state: str) -> int:
        """Sum of its blocks in `state`."""
        return sum(block.size_bytes for block in self.blocks if block.state == state)


@dataclass(frozen=True)
class Live:
    """One allocation that was alive at the peak."""

    size_bytes: int
    where: str


def read_segments(raw: Sequence[Mapping[str, Any]]) -> tuple[Segment, ...]:
    """The segments of a snapshot, the largest first."""
    segments = [_segment(entry) for entry in raw]
    return tuple(sorted(segments, key=lambda segment: segment.size_bytes, reverse=True))


def _segment(raw: Mapping[str, Any]) -> Segment:
    blocks, offset = [], 0
    for entry in raw.get("blocks", ()):
        state = _STATES.get(entry["state"], WAITING if entry["state"] == _PENDING else UNUSED)
        size = int(entry["size"])
        requested = int(entry.get("requested_size", size))
        blocks.append(Block(offset, size, requested, state, where_of(entry.get("frames", ()))))
        offset += size
    kind = str(raw.get("segment_type", "unknown"))
    return Segment(
        address=int(raw.get("address", 0)),
        size_bytes=int(raw["total_size"]),
        kind=f"{kind}, grows" if raw.get("is_expandable") else kind,
        stream=int(raw.get("stream", 0)),
        blocks=tuple(blocks),
    )


def where_of(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost Python lines outside torch, the nearest first; '' without history."""
    told = []
    for frame in frames:
        name = str(frame.get("filename", ""))
        if name.endswith(".py") and "/torch/" not in name:
            told.append(f"{'/'.join(name.split('/')[-2:])}:{frame.get('line')} {frame.get('name')}")
    return " < ".join(told[:FRAMES_TOLD])


def totals(segments: Sequence[Segment]) -> dict[str, int]:
    """What is held and how: bytes, and counts of segments and blocks."""
    unused = [b.size_bytes for s in segments for b in s.blocks if b.state == UNUSED]
    return {
        "held_bytes": sum(segment.size_bytes for segment in segments),
        "in_use_bytes": sum(segment.bytes_of(IN_USE) for segment in segments),
        "waiting_bytes": sum(segment.bytes_of(WAITING) for segment in segments),
        "unused_bytes": sum(unused),
        "largest_unused_bytes": max(unused, default=0),
        "segments": len(segments),
        "blocks": sum(len(segment.blocks) for segment in segments),
    }


def largest_in_use(segments: Sequence[Segment], count: int) -> list[Block]:
    """The largest blocks that tensors use."""
    in_use = (block for segment in segments for block in segment.blocks if block.state == IN_USE)
    return sorted(in_use, key=lambda block: block.size_bytes, reverse=True)[:count]


def as_json(
    segments: Sequence[Segment], peak: Sequence[Live], most_blocks: int = MOST_BLOCKS_KEPT
) -> dict[str, Any]:
    """Everything as JSON values; of all blocks the largest `most_blocks`, the rest as sums."""
    sizes = sorted((b.size_bytes for s in segments for b in s.blocks), reverse=True)
    smallest = sizes[most_blocks - 1] if len(sizes) > most_blocks else 0
    room = most_blocks - sum(size > smallest for size in sizes)
    told = []
    for segment in segments:
        kept = []
        for block in sorted(segment.blocks, key=lambda block: block.size_bytes, reverse=True):
            if block.size_bytes == smallest:
                room -= 1
            if block.size_bytes > smallest or (block.size_bytes == smallest and room >= 0):
                kept.append(block)
        told.append(
            {
                "address": segment.address,
                "size_bytes": segment.size_bytes,
                "kind": segment.kind,
                "stream": segment.stream,
                "blocks": [vars(block) for block in kept],
                "blocks_left_out": len(segment.blocks) - len(kept),
                "bytes_left_out": sum(block.size_bytes for block in segment.blocks)
                - sum(block.size_bytes for block in kept),
            }
        )
    largest = sorted(peak, key=lambda live: live.size_bytes, reverse=True)[:most_blocks]
    return {
        "totals": totals(segments),
        "segments": told,
        "peak_bytes": sum(live.size_bytes for live in peak),
        "peak": [vars(live) for live in largest],
    }


def live_at_peak(
    segments: Sequence[Segment], trace: Sequence[Mapping[str, Any]]
) -> tuple[Live, ...]:
    """What was alive when most was, within the history that `trace` covers; () without one.

    Goes back from what is alive now: an event 'alloc' undone takes a block away, a 'free_completed'
    undone brings one back, of which the history may hold where it was allocated.
    """
    moves = [event for event in trace if event["action"] in ("alloc", "free_completed")]
    if not moves:
        return ()
    now = {
        segment.address + block.offset_bytes: Live(block.size_bytes, block.where)
        for segment in segments
        for block in segment.blocks
        if block.state != UNUSED
    }
    total = peak = sum(live.size_bytes for live in now.values())
    at = len(moves)
    for index in range(len(moves) - 1, -1, -1):
        size = int(moves[index]["size"])
        total += -size if moves[index]["action"] == "alloc" else size
        if total > peak:
            peak, at = total, index
    alive = dict(now)
    for event in reversed(moves[at:]):
        if event["action"] == "alloc":
            alive.pop(int(event["addr"]), None)
        else:
            alive[int(event["addr"])] = Live(int(event["size"]), "")
    for event in moves[:at]:  # where those that were freed since had come from
        address = int(event["addr"])
        if event["action"] == "alloc" and address in alive:
            where = where_of(event.get("frames", ()))
            alive[address] = Live(alive[address].size_bytes, where or alive[address].where)
    return tuple(alive.values())
