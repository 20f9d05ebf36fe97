"""y = x Wᵀ + b for few tokens: each weight is read from memory once, for any number of tokens.

The rows of W are cut into blocks, which the threads of a job claim one after the other. A thread keeps a
block's sums on its stack and walks the block in tiles of a few weight rows, all tokens for each tile: the
tile's weights come from memory for the first tokens and from the nearest cache for the others, while the
next two tiles are fetched.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.np.numpy_support import carray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.engine.cpu._kernels.vector_tile import (
    LANES,
    SQUARE,
    STEP,
    claim,
    dot_tile,
    floats_at,
    integers_at,
    load_bfloat16,
    stack_floats,
    store_bfloat16,
    store_columns,
    widen,
)

__all__ = [
    "BLOCK", "GROUP", "JOB", "MAX_TOKENS", "RUN", "SIGNATURE", "TILE", "add_rest", "fetches", "floats",
    "groups_of", "linear", "run_length_of", "widen_rows", "write",
]  # fmt: skip

SIGNATURE = types.void(types.intp)
JOB = 12
"""int64 fields of a job."""

MAX_TOKENS = 64
BLOCK = 48
"""Most weight rows that a thread claims at once: a multiple of every tile."""

RUN = 640
"""Most elements of a row multiplied at a time: of a few rows and tokens these stay in the L1 cache."""

TILE, GROUP = (2, 8) if LANES > 8 else (3, 4)
"""Rows of a tile, and the most tokens of one: their sums fill the registers.

Measured with AVX-512: two rows and eight tokens are read faster than three rows, as the fewer rows are read
at once the more they lie in order."""

_FEW = 2
"""Tokens whose sums are written one by one."""

_BAND = 6
"""Rows, in tiles, that share the part of x in the L1 cache where there are several groups of tokens."""

_SUMS = MAX_TOKENS * BLOCK
_WIDE = _BAND * RUN

_float_tile, _float_line = dot_tile([TILE] * GROUP), dot_tile([1] * GROUP)
_half_tile, _half_line = dot_tile([TILE] * GROUP, True), dot_tile([1] * GROUP, True)
_store_floats, _store_halves = store_columns(False), store_columns(True)


@kernel
def floats(
    rows: int, tokens: int, w: int, w_stride: int, x: int, x_stride: int, length: int, y: int, near: int,
    far: int,
) -> None:  # fmt: skip
    """A tile, or one row, of float32 weights with one group of tokens."""
    if rows == TILE:
        _float_tile(tokens, w, w_stride, x, x_stride, length, y, MAX_TOKENS, near, far)
    else:
        _float_line(tokens, w, w_stride, x, x_stride, length, y, MAX_TOKENS, near, far)


@kernel
def _halves(
    rows: int, tokens: int, w: int, w_stride: int, x: int, x_stride: int, length: int, y: int, near: int,
    far: int,
) -> None:  # fmt: skip
    """As `floats` for bfloat16 weights and the only group of tokens: each is widened in a register."""
    if rows == TILE:
        _half_tile(tokens, w, w_stride, x, x_stride, length, y, MAX_TOKENS, near, far)
    else:
        _half_line(tokens, w, w_stride, x, x_stride, length, y, MAX_TOKENS, near, far)


@kernel
def groups_of(tokens: int) -> int:
    """Groups of tokens that are multiplied with a tile one after the other."""
    return (tokens + GROUP - 1) // GROUP


@kernel
def fetches(
    row: int, band: int, first: int, last: int, following: int, run: int, next_run: int, length: int,
    stride: int,
) -> tuple[int, int]:  # fmt: skip
    """Elements from a band of rows to the next band and to the one after it, 0 where there is none.

    A thread walks the bands of a block for one run of columns after the other, then the next block's.

    Args:
        row: First row of the band.
        band: Rows of a band.
        first: First row of the block.
        last: Row after the block.
        following: First row of the block that the thread claimed next, or -1.
        run: First column of the run.
        next_run: First column of the next run; `length` or more if there is none.
        length: Elements of a row.
        stride: Elements from a row to the next.

    Example:
        Rows of 10 in blocks of 6 and bands of 2: from row 0, (20, 40); from row 4, if the block at row 12 is
        next, (80, 100).
    """
    near = min(row + band, last)
    far = min(near + band, last) if near < last else last + band
    return (
        _distance(near, row, first, last, following, run, next_run, length, stride),
        _distance(far, row, first, last, following, run, next_run, length, stride),
    )


@kernel
def _distance(
    line: int, row: int, first: int, last: int, following: int, run: int, next_run: int, length: int,
    stride: int,
) -> int:  # fmt: skip
    """Elements from a row to another one; one after the block's end is of what the thread reads then."""
    if line < last:
        return (line - row) * stride
    if next_run < length:
        return (first + line - last - row) * stride + next_run - run
    if following >= 0:
        return (following + line - last - row) * stride - run
    return 0


def linear(job: int) -> None:
    """One thread's share of a job; returns when no block is left to claim.

    A token's result does not depend, to the last bit, on the tokens beside it or on the number of threads.

    Args:
        job: Address of int64[JOB], shared by the threads: [0] the next block, 0 at the start; addresses of
            [1] W, (rows, length), [2] x, float32 (tokens, length), [3] bias, (rows,), or 0, [4] y, (tokens,
            rows), written; [5] tokens, 1 to MAX_TOKENS, [6] rows, [7] length, [8] rows of a block, at most
            BLOCK, [9] elements from a row of W to the next; [10] whether W, bias and y are bfloat16, else
            they are float32; [11] elements from a row of x to the next. bias, y and the rows of W and x are
            contiguous. For bfloat16 each STEP elements of x have those at even indices first, but for a last
            part of fewer.
    """
    field = carray(integers_at(job), (JOB,))
    w, x, bias, y, tokens, rows = field[1], field[2], field[3], field[4], field[5], field[6]
    length, size, stride, half, x_stride = field[7], field[8], field[9], field[10] != 0, field[11]
    bytes_each = 2 if half else 4
    sums_at, wide_at = stack_floats(_SUMS), stack_floats(_WIDE)
    sums = carray(floats_at(sums_at), (BLOCK, MAX_TOKENS))
    groups = groups_of(tokens)
    band = TILE if groups == 1 else _BAND
    run_length = run_length_of(length)
    blocks = (rows + size - 1) // size
    block = claim(job)
    while block < blocks:
        next_block = claim(job)
        following = next_block * size if next_block < blocks else -1
        first, last = block * size, min((block + 1) * size, rows)
        for line in range(last - first):
            for token in range(tokens):
                sums[line, token] = 0.0
        for run in range(0, length, run_length):
            part = min(run_length, length - run)
            whole = part - part % STEP
            for row in range(first, last, band):
                end = min(row + band, last)
                start = w + (row * stride + run) * bytes_each
                near, far = fetches(row, band, first, last, following, run, run + run_length, length, stride)
                near, far = near * bytes_each, far * bytes_each
                widened = half and groups > 1
                tile_stride, tile_bytes = stride, bytes_each
                if widened:
                    for line in range(end - row):
                        widen(start + line * stride * 2, wide_at + line * RUN * 4, whole, near, far)
                    start, near, far, tile_stride, tile_bytes = wide_at, 0, 0, RUN, 4
                begin = 0
                for group in range(groups):
                    after = tokens * (group + 1) // groups
                    given = x + (begin * x_stride + run) * 4
                    line = row
                    while line < end:
                        count = TILE if end - line >= TILE else 1
                        at = start + (line - row) * tile_stride * tile_bytes
                        out = sums_at + ((line - first) * MAX_TOKENS + begin) * 4
                        if half and not widened:
                            _halves(count, after - begin, at, stride, given, x_stride, whole, out, near, far)
                        else:
                            floats(
                                count, after - begin, at, tile_stride, given, x_stride, whole, out, near, far
                            )
                        line += count
                    begin, near, far = after, 0, 0
                if whole < part:
                    at = w + (row * stride + run) * bytes_each
                    out = sums_at + (row - first) * MAX_TOKENS * 4
                    add_rest(end - row, tokens, at, stride, x + run * 4, x_stride, whole, part, out, half)
        write(sums_at, last - first, tokens, bias, y, rows, first, half)
        block = next_block


@kernel
def run_length_of(length: int) -> int:
    """Elements of a row in each run: runs of equal length, at most `RUN`, whole steps."""
    runs = (length + RUN - 1) // RUN
    return max((length + runs * STEP - 1) // (max(runs, 1) * STEP), 1) * STEP


@kernel
def widen_rows(source: int, target: int, rows: int, length: int) -> None:
    """Contiguous rows of bfloat16 to float32, in the order that `linear` wants for bfloat16 weights."""
    whole = length - length % STEP
    for row in range(rows):
        begin, out = source + row * length * 2, target + row * length * 4
        widen(begin, out, whole, 0, 0)
        rest = carray(floats_at(out), (length,))
        for column in range(whole, length):
            rest[column] = load_bfloat16(begin + column * 2)


@kernel
def add_rest(
    count: int,
    tokens: int,
    w: int,
    w_stride: int,
    x: int,
    x_stride: int,
    begin: int,
    end: int,
    y: int,
    half: bool,
) -> None:
    """Adds the products of the last elements of a row whose length is no multiple of a tile's step."""
    for token in range(tokens):
        given = carray(floats_at(x + token * x_stride * 4), (end,))
        for line in range(count):
            out = carray(floats_at(y + (line * MAX_TOKENS + token) * 4), (1,))
            total = np.float32(0.0)
            if half:
                for column in range(begin, end):
                    total += load_bfloat16(w + (line * w_stride + column) * 2) * given[column]
            else:
                weights = carray(floats_at(w + line * w_stride * 4), (end,))
                for column in range(begin, end):
                    total += weights[column] * given[column]
            out[0] += total


@kernel
def write(
    sums_at: int, count: int, tokens: int, bias: int, y: int, rows: int, first: int, half: bool
) -> None:  # fmt: skip
    """Adds the bias to the sums of a block and writes them, token by token, in the type of the weights.

    Args:
        sums_at: Address of the sums, float32 (BLOCK, MAX_TOKENS); changed where there is a bias.
        count: Rows of the block.
        tokens: Number of tokens.
        bias: Address of the bias, (rows,), or 0.
        y: Address of the output, (tokens, rows).
        rows: Number of rows.
        first: First row of the block.
        half: Whether bias and y are bfloat16; else they are float32.
    """
    sums = carray(floats_at(sums_at), (BLOCK, MAX_TOKENS))
    size = 2 if half else 4
    if bias != 0:
        for line in range(count):
            at = bias + (first + line) * size
            term = load_bfloat16(at) if half else carray(floats_at(at), (1,))[0]
            for token in range(tokens):
                sums[line, token] += term
    squares = 0
    if tokens > _FEW and count >= SQUARE:
        squares = (count + SQUARE - 1) // SQUARE
    for square in range(squares):
        # The last one ends with the block, and may write again what one before it wrote.
        line = min(square * SQUARE, count - SQUARE)
        for token in range(0, tokens, SQUARE):
            source = sums_at + (line * MAX_TOKENS + token) * 4
            target = y + (token * rows + first + line) * size
            if half:
                _store_halves(source, MAX_TOKENS, tokens - token, target, rows)
            else:
                _store_floats(source, MAX_TOKENS, tokens - token, target, rows)
    if squares:
        return
    for token in range(tokens):
        target = y + (token * rows + first) * size
        if half:
            for line in range(count):
                store_bfloat16(target + line * 2, sums[line, token])
        else:
            out = carray(floats_at(target), (count,))
            for line in range(count):
                out[line] = sums[line, token]
