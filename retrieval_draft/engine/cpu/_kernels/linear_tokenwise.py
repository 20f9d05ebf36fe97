"""y = x Wᵀ + b for more tokens than a register has lanes: tokens lie in the lanes, weights are spread.

While `linear` sums along a row in the lanes of a register and then across them, here each lane is a token
and nothing is summed across; lanes without a token are wasted. x is packed for it, token beside token. The
rows of W are cut into blocks, which the threads of a job claim; a block is multiplied run by run with a part
of x that stays in the nearest cache.
"""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.engine.cpu._kernels.linear import BLOCK, JOB, MAX_TOKENS, write
from retrieval_draft.engine.cpu._kernels.vector_tile import (
    LANES,
    STEP,
    claim,
    floats_at,
    integers_at,
    load_bfloat16,
    outer_tile,
    stack_floats,
    widen,
)

__all__ = ["MAX_VECTORS", "RUN", "linear_tokenwise", "linear_tokenwise_numpy", "multiply", "pack", "rows_of"]

MAX_VECTORS = MAX_TOKENS // LANES

RUN = 128 if LANES > 8 else 256
"""Most elements of a row that are multiplied at a time: a group of tokens' of them stay in the L1 cache."""

_TURNS = 8
_GROUP = 4 if LANES > 8 else 2
"""Most vectors of tokens in a tile. With this many, and the rows below, the sums fill the registers."""

_SUMS = MAX_TOKENS * BLOCK
_WIDE = BLOCK * RUN

# Rows of a tile, by vectors; all divide BLOCK.
_ROWS_1, _ROWS_2, _ROWS_3, _ROWS_4 = (24, 12, 8, 6) if LANES > 8 else (12, 6, 4, 3)
_tile_1, _line_1, _rest_1 = outer_tile(_ROWS_1, 1, _TURNS), outer_tile(1, 1, _TURNS), outer_tile(1, 1, 1)
_tile_2, _line_2, _rest_2 = outer_tile(_ROWS_2, 2, _TURNS), outer_tile(1, 2, _TURNS), outer_tile(1, 2, 1)
_tile_3, _line_3, _rest_3 = outer_tile(_ROWS_3, 3, _TURNS), outer_tile(1, 3, _TURNS), outer_tile(1, 3, 1)
_tile_4, _line_4, _rest_4 = outer_tile(_ROWS_4, 4, _TURNS), outer_tile(1, 4, _TURNS), outer_tile(1, 4, 1)


@kernel
def rows_of(vectors: int) -> int:
    """Rows of a tile of so many vectors."""
    if vectors == 1:
        return _ROWS_1
    if vectors == 2:
        return _ROWS_2
    return _ROWS_3 if vectors == 3 else _ROWS_4


@kernel
def multiply(
    rows: int, vectors: int, w: int, w_stride: int, x: int, x_stride: int, length: int, y: int, ahead: int
) -> None:
    """A tile of a few rows, or one row, with one group of tokens."""
    whole = length - length % _TURNS
    rest_w, rest_x, rest = w + whole * 4, x + whole * x_stride * 4, length - whole
    if whole:
        if rows == 1:
            if vectors == 1:
                _line_1(w, w_stride, x, x_stride, whole, y, MAX_TOKENS, ahead)
            elif vectors == 2:
                _line_2(w, w_stride, x, x_stride, whole, y, MAX_TOKENS, ahead)
            elif vectors == 3:
                _line_3(w, w_stride, x, x_stride, whole, y, MAX_TOKENS, ahead)
            else:
                _line_4(w, w_stride, x, x_stride, whole, y, MAX_TOKENS, ahead)
        elif vectors == 1:
            _tile_1(w, w_stride, x, x_stride, whole, y, MAX_TOKENS, ahead)
        elif vectors == 2:
            _tile_2(w, w_stride, x, x_stride, whole, y, MAX_TOKENS, ahead)
        elif vectors == 3:
            _tile_3(w, w_stride, x, x_stride, whole, y, MAX_TOKENS, ahead)
        else:
            _tile_4(w, w_stride, x, x_stride, whole, y, MAX_TOKENS, ahead)
    if rest:
        for row in range(rows):
            at, out = rest_w + row * w_stride * 4, y + row * MAX_TOKENS * 4
            if vectors == 1:
                _rest_1(at, w_stride, rest_x, x_stride, rest, out, MAX_TOKENS, ahead)
            elif vectors == 2:
                _rest_2(at, w_stride, rest_x, x_stride, rest, out, MAX_TOKENS, ahead)
            elif vectors == 3:
                _rest_3(at, w_stride, rest_x, x_stride, rest, out, MAX_TOKENS, ahead)
            else:
                _rest_4(at, w_stride, rest_x, x_stride, rest, out, MAX_TOKENS, ahead)


def linear_tokenwise(job: int) -> None:
    """One thread's share of a job; returns when no block is left to claim.

    A token's result does not depend, to the last bit, on the tokens beside it or on the number of threads.

    Args:
        job: As that of `linear`, but for x, which is `pack`ed: (length, LANES · vectors), and [11] the number
            of vectors, 1 to MAX_VECTORS.
    """
    field = carray(integers_at(job), (JOB,))
    w, x, bias, y, tokens, rows = field[1], field[2], field[3], field[4], field[5], field[6]
    length, size, stride, half, vectors = field[7], field[8], field[9], field[10] != 0, field[11]
    bytes_each = 2 if half else 4
    sums_at, wide_at = stack_floats(_SUMS), stack_floats(_WIDE)
    sums = carray(floats_at(sums_at), (BLOCK, MAX_TOKENS))
    groups = (vectors + _GROUP - 1) // _GROUP
    blocks = (rows + size - 1) // size
    block = claim(job)
    while block < blocks:
        next_block = claim(job)
        first, last = block * size, min((block + 1) * size, rows)
        for line in range(last - first):
            for token in range(vectors * LANES):
                sums[line, token] = 0.0
        for run in range(0, length, RUN):
            part = min(RUN, length - run)
            start = w + (first * stride + run) * bytes_each
            then = start
            if run + RUN < length:
                then = start + RUN * bytes_each
            elif next_block < blocks:
                then = w + next_block * size * stride * bytes_each
            ahead, tile_stride = then - start, stride
            if half:
                whole = part - part % STEP
                for line in range(last - first):
                    begin, out = start + line * stride * 2, wide_at + line * RUN * 4
                    widen(begin, out, whole, ahead)
                    rest = carray(floats_at(out), (RUN,))
                    for column in range(whole, part):
                        rest[column] = load_bfloat16(begin + column * 2)
                start, ahead, tile_stride = wide_at, 0, RUN
            begin = 0
            for group in range(groups):
                after = vectors * (group + 1) // groups
                tile_rows = rows_of(after - begin)
                given = x + (run * vectors + begin) * LANES * 4
                line = first
                while line < last:
                    count = tile_rows if last - line >= tile_rows else 1
                    at = start + (line - first) * tile_stride * 4
                    out = sums_at + ((line - first) * MAX_TOKENS + begin * LANES) * 4
                    multiply(count, after - begin, at, tile_stride, given, vectors * LANES, part, out, ahead)
                    line += count
                begin, ahead = after, 0
        for token in range(tokens):
            write(sums[: last - first, token], bias, y, token * rows + first, first, half)
        block = next_block


@kernel
def pack(source: int, target: int, tokens: int, length: int, width: int) -> None:
    """Writes float32 (tokens, length) as (length, width), zeros after the tokens. Addresses, contiguous."""
    given = carray(floats_at(source), (tokens, length))
    out = carray(floats_at(target), (length, width))
    for begin in range(0, length, STEP):
        end = min(begin + STEP, length)
        for first in range(0, width, LANES):
            last = min(first + LANES, tokens)
            for column in range(begin, end):
                for token in range(first, last):
                    out[column, token] = given[token, column]
                for token in range(max(first, last), first + LANES):
                    out[column, token] = 0.0


def linear_tokenwise_numpy(
    x: NDArray[np.float32], w: NDArray[np.float32], bias: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The kernel's twin: in each run of a row a chain of multiply-adds, rounded as in `linear_numpy`.

    Args:
        x: float32, shape (tokens, length).
        w: float32, shape (rows, length).
        bias: float32, shape (rows,), or None.

    Returns:
        float32, shape (tokens, rows).
    """
    out = np.zeros((len(x), len(w)), np.float32)
    for run in range(0, x.shape[1], RUN):
        end = min(run + RUN, x.shape[1])
        whole = end - (end - run) % _TURNS
        for begin, stop in ((run, whole), (whole, end)):
            total = np.zeros(out.shape, np.float64)
            for column in range(begin, stop):
                exact = x[:, None, column].astype(np.float64) * w[None, :, column]
                total = (total + exact).astype(np.float32).astype(np.float64)
            out += total.astype(np.float32)
    return out if bias is None else out + bias
