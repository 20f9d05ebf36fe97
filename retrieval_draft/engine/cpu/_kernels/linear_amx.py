"""y = x Wᵀ + b for bfloat16 on the matrix unit, which multiplies 16 tokens in the time of one.

Weights are read as they lie, in tiles of 16 rows; inputs are packed for it, two elements of each token beside
each other. Sums are float32. The rows of W are cut into blocks, which the threads of a job claim.
"""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.engine.cpu._kernels.amx_tile import (
    TILE_COLUMNS,
    TILE_ROWS,
    amx_tile,
    begin_tiles,
    end_tiles,
)
from retrieval_draft.engine.cpu._kernels.linear import JOB, MAX_TOKENS, fetches, write
from retrieval_draft.engine.cpu._kernels.vector_tile import (
    LANES,
    SQUARE,
    STEP,
    claim,
    floats_at,
    integers_at,
    stack_floats,
    store_bfloat16,
    store_pairs,
)

__all__ = ["AMX_BLOCK", "linear_amx", "pack_pairs"]

AMX_BLOCK = 64
"""Most weight rows that a thread claims at once."""

_BAND = 2 * TILE_ROWS
_RUN = 1024
"""Elements of a row multiplied at a time: the inputs of 64 tokens stay in the second cache."""

_SUMS = AMX_BLOCK * MAX_TOKENS


def linear_amx(job: int) -> None:
    """One thread's share of a job; returns when no block is left to claim.

    A token's result does not depend, to the last bit, on the tokens beside it or on the number of threads.

    Args:
        job: As that of `linear`, for bfloat16, rows and block in whole tiles of `TILE_ROWS`, the length in
            those of `TILE_COLUMNS`; but x is packed by `pack_pairs`, and [11] is the number of groups of
            `TILE_ROWS` tokens there.
    """
    field = carray(integers_at(job), (JOB,))
    w, x, bias, y, tokens, rows = field[1], field[2], field[3], field[4], field[5], field[6]
    length, size, stride, groups = field[7], field[8], field[9] * 2, field[11]
    sums_at = stack_floats(_SUMS)
    sums = carray(floats_at(sums_at), (AMX_BLOCK, MAX_TOKENS))
    x_stride = groups * TILE_ROWS * 4
    blocks = (rows + size - 1) // size
    begin_tiles()
    block = claim(job)
    while block < blocks:
        next_block = claim(job)
        following = next_block * size if next_block < blocks else -1
        first, last = block * size, min((block + 1) * size, rows)
        for line in range(last - first):
            for token in range(groups * TILE_ROWS):
                sums[line, token] = 0.0
        for run in range(0, length, _RUN):
            steps = min(_RUN, length - run) // TILE_COLUMNS
            for row in range(first, last, _BAND):
                other = min(row + TILE_ROWS, last - TILE_ROWS)  # of one tile alone twice the same
                _, far = fetches(row, _BAND, first, last, following, run, run + _RUN, length, stride)
                for group in range(0, groups, 2):
                    out = sums_at + group * TILE_ROWS * 4
                    amx_tile(
                        min(2, groups - group), w + row * stride + run * 2, w + other * stride + run * 2,
                        stride, x + run // 2 * x_stride + group * TILE_ROWS * 4, x_stride, steps,
                        out + (row - first) * MAX_TOKENS * 4, out + (other - first) * MAX_TOKENS * 4,
                        MAX_TOKENS * 4, far,
                    )  # fmt: skip
                    far = 0
        write(sums_at, last - first, tokens, bias, y, rows, first, True)
        block = next_block
    end_tiles()


@kernel
def pack_pairs(source: int, stride: int, target: int, tokens: int, length: int, width: int) -> None:
    """Writes float32 (tokens, length) as bfloat16 (length / 2, width, 2), zeros after the tokens.

    Of each `STEP` elements of a source row those at even indices come first. Addresses; the length is a
    multiple of STEP, `stride` the elements from a source row to the next.

    Example:
        Tokens with elements 1 2 3 4 and 5 6 7 8, packed for two: 1 2 5 6, then 3 4 7 8.
    """
    given = carray(floats_at(source), (tokens, stride))
    whole = tokens - tokens % SQUARE
    for begin in range(0, length, STEP):
        for first in range(0, LANES, SQUARE):
            out = target + (begin // 2 + first) * width * 4
            for token in range(0, whole, SQUARE):
                store_pairs(source + (token * stride + begin + first) * 4, stride, out + token * 4, width)
            for pair in range(SQUARE):
                for token in range(whole, width):
                    even, odd = np.float32(0.0), np.float32(0.0)
                    if token < tokens:
                        even = given[token, begin + first + pair]
                        odd = given[token, begin + first + pair + LANES]
                    store_bfloat16(out + (pair * width + token) * 4, even)
                    store_bfloat16(out + (pair * width + token) * 4 + 2, odd)
