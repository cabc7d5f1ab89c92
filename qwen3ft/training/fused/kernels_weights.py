"""The Triton kernel that dequantises a group of 4-bit weights and copies their adapters.

A program computes one tile of one weight, or copies a part of the adapters.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# At Qwen3's sizes a launch takes 3 to 30 us, limited by memory and by the instructions for each
# number. So values are looked up in shared memory: computing addresses in global memory would take
# longer than the values, and 16 values have no bank conflicts. A block's constant is computed once,
# not by every thread that needs it.

TILE_ROWS = 32
TILE_WORDS = 64
WARPS = 8


@triton.jit(do_not_specialize=["rows_0", "rows_1", "rows_2", "below_rows", "out_stride"])
def dequantize_kernel(
    packed_0: tl.tensor,
    code_0: tl.tensor,
    absmax_0: tl.tensor,
    nested_code_0: tl.tensor,
    nested_absmax_0: tl.tensor,
    nested_offset_0: tl.tensor,
    packed_1: tl.tensor,
    code_1: tl.tensor,
    absmax_1: tl.tensor,
    nested_code_1: tl.tensor,
    nested_absmax_1: tl.tensor,
    nested_offset_1: tl.tensor,
    packed_2: tl.tensor,
    code_2: tl.tensor,
    absmax_2: tl.tensor,
    nested_code_2: tl.tensor,
    nested_absmax_2: tl.tensor,
    nested_offset_2: tl.tensor,
    out: tl.tensor,
    beside: tl.tensor,
    below: tl.tensor,
    rows_0: tl.tensor,
    rows_1: tl.tensor,
    rows_2: tl.tensor,
    below_rows: tl.tensor,
    out_stride: tl.tensor,
    unit: tl.constexpr,
    words: tl.constexpr,
    beside_columns: tl.constexpr,
    nested: tl.constexpr,
    block_words: tl.constexpr,
    nested_block: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_words: tl.constexpr,
) -> None:
    """Write three weights below each other, the last perhaps with no rows; a row has `words`."""
    # Find the weight of this tile of rows, and its start: in tiles, and in rows of `out`.
    tile = tl.program_id(1)
    tiles_0, tiles_1 = tl.cdiv(rows_0, tile_rows), tl.cdiv(rows_1, tile_rows)
    tiles_2 = tl.cdiv(rows_2, tile_rows)
    packed, code, absmax = packed_0, code_0, absmax_0
    nested_code, nested_absmax, nested_offset = nested_code_0, nested_absmax_0, nested_offset_0
    start, rows = 0, rows_0
    if tile >= tiles_0 + tiles_1:
        packed, code, absmax = packed_2, code_2, absmax_2
        if nested:
            nested_code, nested_absmax, nested_offset = (
                nested_code_2,
                nested_absmax_2,
                nested_offset_2,
            )
        start, rows = rows_0 + rows_1, rows_2
        tile -= tiles_0 + tiles_1
        if tile >= tiles_2:
            start, rows = start + rows_2, below_rows
            tile -= tiles_2
    elif tile >= tiles_0:
        packed, code, absmax = packed_1, code_1, absmax_1
        if nested:
            nested_code, nested_absmax, nested_offset = (
                nested_code_1,
                nested_absmax_1,
                nested_offset_1,
            )
        start, rows = rows_0, rows_1
        tile -= tiles_0

    first = tile * tile_rows
    stride = out_stride * unit
    target = out + (start + first).to(tl.int64) * stride
    if tl.program_id(1) >= tiles_0 + tiles_1 + tiles_2:
        if below is not None:
            begin = tl.program_id(0) * (tile_words * 8)
            pieces: tl.constexpr = tile_words // 8
            below += first.to(tl.int64) * (words * 8)
            _copy(
                below, words * 8, target, stride, rows - first, begin, words * 8, pieces, tile_rows
            )
    elif tl.program_id(0) * tile_words >= words:
        if beside is not None:
            beside += (start + first).to(tl.int64) * beside_columns
            end: tl.constexpr = beside_columns
            steps: tl.constexpr = (end + 63) // 64
            target += words * 8
            _copy(beside, end, target, stride, rows - first, 0, end, steps, tile_rows)
    else:
        # One dimension for rows and words makes the threads of a warp write along a row.
        flat = tl.arange(0, tile_rows * tile_words)
        row, column = flat // tile_words, tl.program_id(0) * tile_words + flat % tile_words
        inside = (row < rows - first) & (column < words)
        table = tl.load(code + tl.arange(0, 16))
        source = packed.to(tl.pointer_type(tl.int32)) + first.to(tl.int64) * words
        word = tl.load(source + row * words + column, mask=inside, other=0)
        constant = _constants(
            absmax,
            nested_code,
            nested_absmax,
            nested_offset,
            first,
            rows - first,
            words // block_words,
            nested,
            nested_block,
            tile_rows,
            tile_words // block_words,
        )
        blocks: tl.constexpr = tile_rows * tile_words // block_words
        constant = tl.broadcast_to(constant[:, None], (blocks, block_words))
        constant = constant.reshape(tile_rows * tile_words)

        # Bytes are in memory order, with the high nibble first: shifts of 4, 0, 12, 8, ...
        number = tl.arange(0, 8)
        nibble = (word[:, None] >> (4 * (number ^ 1))[None, :]) & 15
        value = tl.gather(table, nibble.reshape(tile_rows * tile_words * 8), 0)
        value = value.reshape(tile_rows * tile_words, 8) * constant[:, None]
        place = (row * stride + column * 8)[:, None] + number[None, :]
        tl.store(target + place, value.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _constants(
    absmax: tl.tensor,
    nested_code: tl.tensor,
    nested_absmax: tl.tensor,
    nested_offset: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    blocks: tl.constexpr,
    nested: tl.constexpr,
    nested_block: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_blocks: tl.constexpr,
) -> tl.tensor:
    """Return the constants of a tile that begins at row `first`; a row has `blocks`."""
    flat = tl.arange(0, tile_rows * tile_blocks)
    row, column = flat // tile_blocks, tl.program_id(0) * tile_blocks + flat % tile_blocks
    inside = (row < rows) & (column < blocks)
    block = (first + row) * blocks + column
    constant = tl.load(absmax + block, mask=inside, other=0)
    if nested:
        outer = tl.load(nested_absmax + block // nested_block, mask=inside, other=0)
        offset = tl.load(nested_offset)
        constant = tl.load(nested_code + constant.to(tl.int32)) * outer + offset
    return constant


@triton.jit
def _copy(
    source: tl.tensor,
    source_stride: tl.tensor,
    target: tl.tensor,
    target_stride: tl.tensor,
    rows: tl.tensor,
    begin: tl.tensor,
    end: tl.constexpr,
    steps: tl.constexpr,
    tile_rows: tl.constexpr,
) -> None:
    """Copy the columns from `begin` to before `end`, 64 a step."""
    # More at a time would take registers from the other programs.
    row = tl.arange(0, tile_rows)[:, None]
    for step in range(steps):
        column = begin + step * 64 + tl.arange(0, 64)[None, :]
        inside = (row < rows) & (column < end)
        value = tl.load(source + row * source_stride + column, mask=inside)
        tl.store(target + row * target_stride + column, value, mask=inside)
