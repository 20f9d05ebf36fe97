"""y = x Wᵀ + b for few tokens: each weight is read from memory once, for any number of tokens.

The rows of W are cut into blocks, which the threads of a job claim one after the other. A thread keeps a
block's sums on its stack and walks the block in tiles of a few weight rows, all tokens for each tile: the
tile's weights come from memory for the first tokens and from the nearest cache for the others, while the
next tile is fetched.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.engine.cpu._kernels.vector_tile import (
    LANES,
    STEP,
    claim,
    dot_tile,
    floats_at,
    integers_at,
    load_bfloat16,
    stack_floats,
    store_bfloat16,
    widen,
)

__all__ = [
    "BLOCK", "JOB", "MAX_TOKENS", "RUN", "SIGNATURE", "TILE", "add_rest", "floats", "linear",
    "linear_numpy", "run_length_of", "widen_rows", "write",
]  # fmt: skip

SIGNATURE = types.void(types.intp)
JOB = 12
"""int64 fields of a job."""

MAX_TOKENS = 64
BLOCK = 24
"""Most weight rows that a thread claims at once: a multiple of every tile."""

RUN = 640
"""Most elements of a row multiplied at a time: of these six rows and four tokens stay in the L1 cache."""

_GROUP = 4
_FETCHES = 3
"""Groups after which the next tile has been prefetched; one is too few, as busy cores drop prefetches."""

TILE, _TILE_FOR_TWO, _TILE_FOR_ONE = 3, 4, 8
_TILE_OF_HALVES = 2
_SUMS = MAX_TOKENS * BLOCK
_BAND = 2 * TILE
_WIDE = _BAND * RUN

_f1x1, _f1x2, _f1x3, _f1x4 = dot_tile(1, 1), dot_tile(1, 2), dot_tile(1, 3), dot_tile(1, 4)
_f3x1, _f3x2, _f3x3, _f3x4 = dot_tile(3, 1), dot_tile(3, 2), dot_tile(3, 3), dot_tile(3, 4)
_f4x2, _f8x1 = dot_tile(4, 2), dot_tile(8, 1)
_h1x1, _h1x2, _h1x3, _h1x4 = (
    dot_tile(1, 1, True), dot_tile(1, 2, True), dot_tile(1, 3, True), dot_tile(1, 4, True),
)  # fmt: skip
_h3x3, _h2x4 = dot_tile(3, 3, True), dot_tile(2, 4, True)
_h4x2, _h8x1 = dot_tile(4, 2, True), dot_tile(8, 1, True)


@kernel
def floats(
    rows: int, tokens: int, w: int, w_stride: int, x: int, x_stride: int, length: int, y: int, ahead: int
) -> None:
    """A tile of float32 weights with one group of tokens."""
    if rows == TILE:
        if tokens == 4:
            _f3x4(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
        elif tokens == 3:
            _f3x3(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
        elif tokens == 2:
            _f3x2(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
        else:
            _f3x1(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif rows == _TILE_FOR_TWO:
        _f4x2(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif rows == _TILE_FOR_ONE:
        _f8x1(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif tokens == 4:
        _f1x4(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif tokens == 3:
        _f1x3(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif tokens == 2:
        _f1x2(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    else:
        _f1x1(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)


@kernel
def _halves(
    rows: int, tokens: int, w: int, w_stride: int, x: int, x_stride: int, length: int, y: int, ahead: int
) -> None:
    """A tile of bfloat16 weights with the only group of tokens: each weight is widened in a register."""
    if rows == TILE:
        _h3x3(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif rows == _TILE_OF_HALVES:
        _h2x4(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif rows == _TILE_FOR_TWO:
        _h4x2(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif rows == _TILE_FOR_ONE:
        _h8x1(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif tokens == 4:
        _h1x4(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif tokens == 3:
        _h1x3(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    elif tokens == 2:
        _h1x2(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)
    else:
        _h1x1(w, w_stride, x, x_stride, length, y, MAX_TOKENS, ahead)


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
    groups = (tokens + _GROUP - 1) // _GROUP
    tile_rows = _TILE_FOR_ONE if tokens == 1 else _TILE_FOR_TWO if tokens == 2 else TILE
    if half and tokens == _GROUP:
        tile_rows = _TILE_OF_HALVES
    # With several groups of tokens two tiles share the part of x in the L1 cache.
    band = tile_rows if groups == 1 else _BAND
    run_length = run_length_of(length)
    blocks = (rows + size - 1) // size
    block = claim(job)
    while block < blocks:
        next_block = claim(job)
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
                then = start
                if end < last:
                    then = w + (end * stride + run) * bytes_each
                elif run + run_length < length:
                    then = w + (first * stride + run + run_length) * bytes_each
                elif next_block < blocks:
                    then = w + next_block * size * stride * bytes_each
                ahead = then - start
                widened = half and groups > 1
                if widened:
                    for line in range(end - row):
                        widen(start + line * stride * 2, wide_at + line * RUN * 4, whole, ahead)
                    start, ahead = wide_at, 0
                tile_stride = RUN if widened else stride
                tile_bytes = 4 if widened else bytes_each
                begin = 0
                for group in range(groups):
                    after = tokens * (group + 1) // groups
                    given = x + (begin * x_stride + run) * 4
                    line = row
                    while line < end:
                        count = tile_rows if end - line >= tile_rows else 1
                        at = start + (line - row) * tile_stride * tile_bytes
                        out = sums_at + ((line - first) * MAX_TOKENS + begin) * 4
                        if half and not widened:
                            _halves(count, after - begin, at, stride, given, x_stride, whole, out, ahead)
                        else:
                            floats(count, after - begin, at, tile_stride, given, x_stride, whole, out, ahead)
                        line += count
                    begin = after
                    if group == _FETCHES:
                        ahead = 0
                if whole < part:
                    at = w + (row * stride + run) * bytes_each
                    out = sums_at + (row - first) * MAX_TOKENS * 4
                    add_rest(end - row, tokens, at, stride, x + run * 4, x_stride, whole, part, out, half)
        for token in range(tokens):
            write(sums[: last - first, token], bias, y, token * rows + first, first, half)
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
        widen(begin, out, whole, 0)
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
def write(sums: NDArray[np.float32], bias: int, y: int, offset: int, first: int, half: bool) -> None:
    """Adds the bias to a token's sums and writes them in the type of the weights.

    Args:
        sums: float32, shape (count,).
        bias: Address of the bias, or 0.
        y: Address of the output.
        offset: Elements of y before the first sum.
        first: Elements of the bias before that of the first sum.
        half: Whether bias and y are bfloat16; else they are float32.
    """
    count = sums.shape[0]
    if half:
        for index in range(count):
            total = sums[index]
            if bias != 0:
                total += load_bfloat16(bias + (first + index) * 2)
            store_bfloat16(y + (offset + index) * 2, total)
        return
    out = carray(floats_at(y + offset * 4), (count,))
    for index in range(count):
        out[index] = sums[index]
    if bias != 0:
        terms = carray(floats_at(bias + first * 4), (count,))
        for index in range(count):
            out[index] += terms[index]


def linear_numpy(
    x: NDArray[np.float32], w: NDArray[np.float32], bias: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The kernel's twin, in its order of summation: `LANES` lanes along a row, each a chain of multiply-adds.

    numpy has no fused multiply-add: products are formed in float64, where they are exact, and each sum is
    rounded to float32, which differs from fusing only where two roundings meet.

    Args:
        x: float32, shape (tokens, length).
        w: float32, shape (rows, length).
        bias: float32, shape (rows,), or None.

    Returns:
        float32, shape (tokens, rows).
    """
    tokens, length = x.shape
    out = np.zeros((tokens, w.shape[0]), np.float32)
    run_length = run_length_of(length)
    for run in range(0, length, run_length):
        part = min(run_length, length - run)
        whole = part - part % STEP
        lanes = np.zeros((tokens, w.shape[0], LANES), np.float64)
        for column in range(run, run + whole, LANES):
            exact = (
                x[:, None, column : column + LANES].astype(np.float64) * w[None, :, column : column + LANES]
            )
            lanes = (lanes + exact).astype(np.float32).astype(np.float64)
        halves = lanes.astype(np.float32)
        while halves.shape[-1] > 1:
            middle = halves.shape[-1] // 2
            halves = halves[..., :middle] + halves[..., middle:]
        out += halves[..., 0]
        rest = np.zeros_like(out)
        for column in range(run + whole, run + part):
            rest += x[:, None, column] * w[None, :, column]
        if whole < part:
            out += rest
    return out if bias is None else out + bias
