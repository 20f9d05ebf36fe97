"""y = x Wᵀ + b for more tokens than a register has lanes: tokens lie in the lanes, weights are spread.

While `linear` sums along a row in the lanes of a register and then across them, here each lane is a token
and nothing is summed across; lanes without a token are wasted. x is packed for it, token beside token. The
rows of W are cut into blocks, which the threads of a job claim; a block is multiplied tile by tile with a
part of x that stays in the second cache, while the next two tiles are fetched.
"""

from __future__ import annotations

from numba.np.numpy_support import carray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.engine.cpu._kernels.linear import BLOCK, JOB, MAX_TOKENS, RUN, fetches, write
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

__all__ = ["MAX_VECTORS", "linear_tokenwise", "multiply", "pack", "rows_of"]

MAX_VECTORS = MAX_TOKENS // LANES

_TURNS = 16
"""Elements of a row multiplied by one turn of a tile's loop: of a row a cache line."""

_ROWS, _GROUP = ((12, 8, 8, 6), 4) if LANES > 8 else ((6, 6, 4, 3), 2)
"""Rows of a tile, by vectors of tokens, and the most vectors here: the sums fill the registers.

Groups of vectors have tiles of equal rows, which divide BLOCK."""

_SUMS = MAX_TOKENS * BLOCK
_WIDE = max(_ROWS) * RUN

_SINGLE = (1,) * len(_ROWS)
_tile, _tile_rest = outer_tile(_ROWS, _TURNS), outer_tile(_ROWS, 1)
_line, _line_rest = outer_tile(_SINGLE, _TURNS), outer_tile(_SINGLE, 1)


@kernel
def rows_of(vectors: int) -> int:
    """Rows of a tile of so many vectors."""
    return _ROWS[vectors - 1]


@kernel
def multiply(
    rows: int, vectors: int, w: int, w_stride: int, x: int, x_stride: int, length: int, y: int, near: int,
    far: int,
) -> None:  # fmt: skip
    """A tile of a few rows, or one row, with one group of tokens."""
    whole = length - length % _TURNS
    rest, rest_w, rest_x = length - whole, w + whole * 4, x + whole * x_stride * 4
    if rows == 1:
        if whole:
            _line(vectors, w, w_stride, x, x_stride, whole, y, MAX_TOKENS, near, far)
        if rest:
            _line_rest(vectors, rest_w, w_stride, rest_x, x_stride, rest, y, MAX_TOKENS, near, far)
    else:
        if whole:
            _tile(vectors, w, w_stride, x, x_stride, whole, y, MAX_TOKENS, near, far)
        if rest:
            _tile_rest(vectors, rest_w, w_stride, rest_x, x_stride, rest, y, MAX_TOKENS, near, far)


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
    band = rows_of(vectors // groups)
    blocks = (rows + size - 1) // size
    block = claim(job)
    while block < blocks:
        next_block = claim(job)
        following = next_block * size if next_block < blocks else -1
        first, last = block * size, min((block + 1) * size, rows)
        for line in range(last - first):
            for token in range(vectors * LANES):
                sums[line, token] = 0.0
        for run in range(0, length, RUN):
            part = min(RUN, length - run)
            for row in range(first, last, band):
                end = min(row + band, last)
                start = w + (row * stride + run) * bytes_each
                near, far = fetches(row, band, first, last, following, run, run + RUN, length, stride)
                near, far, tile_stride = near * bytes_each, far * bytes_each, stride
                if half:
                    whole = part - part % STEP
                    for line in range(end - row):
                        begin, out = start + line * stride * 2, wide_at + line * RUN * 4
                        widen(begin, out, whole, near, far)
                        rest = carray(floats_at(out), (RUN,))
                        for column in range(whole, part):
                            rest[column] = load_bfloat16(begin + column * 2)
                    start, near, far, tile_stride = wide_at, 0, 0, RUN
                begin = 0
                for group in range(groups):
                    after = vectors * (group + 1) // groups
                    tile_rows = rows_of(after - begin)
                    given = x + (run * vectors + begin) * LANES * 4
                    line = row
                    while line < end:
                        count = tile_rows if end - line >= tile_rows else 1
                        at = start + (line - row) * tile_stride * 4
                        out = sums_at + ((line - first) * MAX_TOKENS + begin * LANES) * 4
                        multiply(
                            count,
                            after - begin,
                            at,
                            tile_stride,
                            given,
                            vectors * LANES,
                            part,
                            out,
                            near,
                            far,
                        )
                        line += count
                    begin, near, far = after, 0, 0
        write(sums_at, last - first, tokens, bias, y, rows, first, half)
        block = next_block


@kernel
def pack(source: int, stride: int, target: int, tokens: int, length: int, width: int) -> None:
    """Writes float32 (tokens, length) as (length, width), zeros after the tokens.

    Addresses; `stride` is the elements from a source row to the next.
    """
    given = carray(floats_at(source), (tokens, stride))
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
