"""y = x Wᵀ + b for few tokens and quantised weights, which are read once, as the integers that they are.

As in `linear` the threads claim blocks of rows. Up to four tokens are multiplied with weights that become
float32 in registers, and int8 with some more; for many a band of rows is widened into the nearest cache, once
for all tokens. Either way the order of the sums is that of `linear`.
"""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.engine.cpu._kernels.linear import (
    BLOCK,
    MAX_TOKENS,
    RUN,
    TILE,
    add_rest,
    floats,
    linear_numpy,
    run_length_of,
    write,
)
from retrieval_draft.engine.cpu._kernels.quantized_tile import (
    integer_at,
    quantized_tile,
    widen_integers,
)
from retrieval_draft.engine.cpu._kernels.vector_tile import STEP, claim, floats_at, integers_at, stack_floats

__all__ = ["QUANTIZED_JOB", "linear_quantized", "linear_quantized_numpy"]

QUANTIZED_JOB = 16
"""int64 fields of a job."""

_GROUP = 4
_TILE_FOR_TWO, _TILE_FOR_ONE = 4, 8
_OFTEN = 4
"""Groups of tokens for which int8 are widened in registers: measured, more are better widened once."""

_BAND = 6
"""Rows of weights widened at a time."""

_SUMS = 2 * BLOCK * MAX_TOKENS
_WIDE = _BAND * RUN

_i1x1, _i1x2, _i1x3, _i1x4 = (quantized_tile(1, tokens, 1, False, BLOCK) for tokens in (1, 2, 3, 4))
_i8x1, _i4x2, _i3x3, _i3x4 = (
    quantized_tile(rows, tokens, 1, False, BLOCK) for rows, tokens in ((8, 1), (4, 2), (3, 3), (3, 4))
)
_g1x1, _g1x2, _g1x3, _g1x4 = (quantized_tile(1, tokens, 1, True, BLOCK) for tokens in (1, 2, 3, 4))
_g8x1, _g4x2, _g3x3, _g3x4 = (
    quantized_tile(rows, tokens, 1, True, BLOCK) for rows, tokens in ((8, 1), (4, 2), (3, 3), (3, 4))
)
_n1x1, _n1x2, _n1x3, _n1x4 = (quantized_tile(1, tokens, 2, True, BLOCK) for tokens in (1, 2, 3, 4))
_n4x1, _n2x2 = (quantized_tile(rows, tokens, 2, True, BLOCK) for rows, tokens in ((4, 1), (2, 2)))
_widen, _widen_groups, _widen_nibbles = (
    widen_integers(1, False), widen_integers(1, True), widen_integers(2, True),
)  # fmt: skip


@kernel
def _integers(
    rows: int, tokens: int, w: int, w_stride: int, x: int, x_stride: int, length: int, y: int, ahead: int
) -> None:
    """A tile of int8 weights, whose scale is applied to the sums, with the only group of tokens."""
    s = MAX_TOKENS
    if rows == _TILE_FOR_ONE:
        _i8x1(w, w_stride, x, x_stride, length, y, s, ahead, 0, 0, 0, 0, 0)
    elif rows == _TILE_FOR_TWO:
        _i4x2(w, w_stride, x, x_stride, length, y, s, ahead, 0, 0, 0, 0, 0)
    elif rows == TILE:
        if tokens == 3:
            _i3x3(w, w_stride, x, x_stride, length, y, s, ahead, 0, 0, 0, 0, 0)
        else:
            _i3x4(w, w_stride, x, x_stride, length, y, s, ahead, 0, 0, 0, 0, 0)
    elif tokens == 1:
        _i1x1(w, w_stride, x, x_stride, length, y, s, ahead, 0, 0, 0, 0, 0)
    elif tokens == 2:
        _i1x2(w, w_stride, x, x_stride, length, y, s, ahead, 0, 0, 0, 0, 0)
    elif tokens == 3:
        _i1x3(w, w_stride, x, x_stride, length, y, s, ahead, 0, 0, 0, 0, 0)
    else:
        _i1x4(w, w_stride, x, x_stride, length, y, s, ahead, 0, 0, 0, 0, 0)


@kernel
def _grouped(
    rows: int,
    tokens: int,
    w: int,
    w_stride: int,
    x: int,
    x_stride: int,
    length: int,
    y: int,
    ahead: int,
    terms: int,
    terms_stride: int,
    left: int,
    group: int,
) -> None:
    """A tile of int8 weights with scales by group."""
    s = MAX_TOKENS
    if rows == _TILE_FOR_ONE:
        _g8x1(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, 0, left, group)
    elif rows == _TILE_FOR_TWO:
        _g4x2(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, 0, left, group)
    elif rows == TILE:
        if tokens == 3:
            _g3x3(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, 0, left, group)
        else:
            _g3x4(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, 0, left, group)
    elif tokens == 1:
        _g1x1(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, 0, left, group)
    elif tokens == 2:
        _g1x2(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, 0, left, group)
    elif tokens == 3:
        _g1x3(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, 0, left, group)
    else:
        _g1x4(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, 0, left, group)


@kernel
def _nibbles(
    rows: int,
    tokens: int,
    w: int,
    w_stride: int,
    x: int,
    x_stride: int,
    length: int,
    y: int,
    ahead: int,
    terms: int,
    terms_stride: int,
    terms_plane: int,
    left: int,
    group: int,
) -> None:
    """A tile of weights of half a byte with scales by group."""
    s = MAX_TOKENS
    if rows == 4:
        _n4x1(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, terms_plane, left, group)
    elif rows == 2:
        _n2x2(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, terms_plane, left, group)
    elif tokens == 1:
        _n1x1(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, terms_plane, left, group)
    elif tokens == 2:
        _n1x2(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, terms_plane, left, group)
    elif tokens == 3:
        _n1x3(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, terms_plane, left, group)
    else:
        _n1x4(w, w_stride, x, x_stride, length, y, s, ahead, terms, terms_stride, terms_plane, left, group)


def linear_quantized(job: int) -> None:
    """One thread's share of a job; returns when no block is left to claim.

    A token's result does not depend, to the last bit, on the tokens beside it or on the number of threads.

    Args:
        job: Address of int64[QUANTIZED_JOB], shared by the threads: [0] the next block, 0 at the start;
            addresses of [1] W, [2] x, float32 (tokens, length), [3] bias, (rows,), or 0, [4] y, (tokens,
            rows), written; [5] tokens, 1 to MAX_TOKENS, [6] rows, [7] length, [8] rows of bytes of a block,
            at most BLOCK, [9] bytes from a row of W to the next; [10] whether bias and y are bfloat16, else
            they are float32; [11] planes: 1, W is int8 (rows, length), or 2, W is uint8 (rows / 2, length),
            with row r in the lower halves of row r and row rows / 2 + r in the upper ones;
            [12] address of the terms: without groups float32 (rows,), scales; with groups float32 (rows,
            groups, 2), each group's scale and what is added to a scaled weight; [13] elements of a
            group, a multiple of STEP that divides length, or 0 for scales by row, for one plane only.
    """
    field = carray(integers_at(job), (QUANTIZED_JOB,))
    w, x, bias, y, tokens, rows = field[1], field[2], field[3], field[4], field[5], field[6]
    length, size, stride, half, planes = field[7], field[8], field[9], field[10] != 0, field[11]
    terms, group = field[12], field[13]
    sums_at, wide_at = stack_floats(_SUMS), stack_floats(_WIDE)
    sums = carray(floats_at(sums_at), (2 * BLOCK, MAX_TOKENS))
    lines = rows // planes
    groups_each = length // group if group else 0
    terms_stride = 2 * groups_each
    terms_plane = lines * terms_stride
    groups = (tokens + _GROUP - 1) // _GROUP
    # For several groups of tokens weights are widened anew, beside the sums, which take longer.
    in_registers = groups <= (_OFTEN if group == 0 else 2 if planes == 1 else 1)
    tile_rows = _TILE_FOR_ONE if tokens == 1 else _TILE_FOR_TWO if tokens == 2 else TILE
    if planes == 2:
        tile_rows = 4 if tokens == 1 else 2 if tokens == 2 else 1
    band = tile_rows if groups == 1 else _BAND // planes
    run_length = run_length_of(length)
    blocks = (lines + size - 1) // size
    block = claim(job)
    while block < blocks:
        next_block = claim(job)
        first, last = block * size, min((block + 1) * size, lines)
        for plane in range(planes):
            for line in range(last - first):
                for token in range(tokens):
                    sums[plane * BLOCK + line, token] = 0.0
        for run in range(0, length, run_length):
            part = min(run_length, length - run)
            whole = part - part % STEP
            left = group - run % group if group else 0
            for row in range(first, last, band):
                end = min(row + band, last)
                start = w + row * stride + run
                then = start
                if end < last:
                    then = w + end * stride + run
                elif run + run_length < length:
                    then = w + first * stride + run + run_length
                elif next_block < blocks:
                    then = w + next_block * size * stride
                ahead = then - start
                first_term = terms
                if group:
                    first_term += (row * terms_stride + run // group * 2) * 4
                if in_registers:
                    begin = 0
                    for part_of_tokens in range(groups):
                        after = tokens * (part_of_tokens + 1) // groups
                        some = after - begin
                        count_most = tile_rows
                        if groups > 1:
                            count_most = _TILE_FOR_TWO if some == 2 else TILE
                        given = x + (begin * length + run) * 4
                        line = row
                        while line < end:
                            count = count_most if end - line >= count_most else 1
                            at = start + (line - row) * stride
                            out = sums_at + ((line - first) * MAX_TOKENS + begin) * 4
                            term = first_term + (line - row) * terms_stride * 4
                            if group == 0:
                                _integers(count, some, at, stride, given, length, whole, out, ahead)
                            elif planes == 1:
                                _grouped(
                                    count, some, at, stride, given, length, whole, out, ahead, term,
                                    terms_stride, left, group,
                                )  # fmt: skip
                            else:
                                _nibbles(
                                    count, some, at, stride, given, length, whole, out, ahead, term,
                                    terms_stride, terms_plane, left, group,
                                )  # fmt: skip
                            line += count
                        begin, ahead = after, 0
                else:
                    for line in range(row, end):
                        _widen_row(
                            w + line * stride + run, wide_at + (line - row) * RUN * 4, whole, ahead, planes,
                            first_term + (line - row) * terms_stride * 4, terms_plane, left, group,
                        )  # fmt: skip
                    begin = 0
                    for part_of_tokens in range(groups):
                        after = tokens * (part_of_tokens + 1) // groups
                        given = x + (begin * length + run) * 4
                        for plane in range(planes):
                            line = row
                            while line < end:
                                count = TILE if end - line >= TILE else 1
                                at = wide_at + (plane * band + line - row) * RUN * 4
                                out = sums_at + ((plane * BLOCK + line - first) * MAX_TOKENS + begin) * 4
                                floats(count, after - begin, at, RUN, given, length, whole, out, 0)
                                line += count
                        begin = after
                if whole < part:  # never with groups, which are whole steps
                    out = sums_at + (row - first) * MAX_TOKENS * 4
                    _rest_of_rows(
                        end - row, tokens, start, stride, x + run * 4, length, whole, part, out, wide_at
                    )
        for plane in range(planes):
            from_row = plane * lines + first
            if group == 0:
                scales = carray(floats_at(terms), (rows,))
                for line in range(last - first):
                    for token in range(tokens):
                        sums[line, token] *= scales[first + line]
            for token in range(tokens):
                write(
                    sums[plane * BLOCK : plane * BLOCK + last - first, token], bias, y,
                    token * rows + from_row, from_row, half,
                )  # fmt: skip
        block = next_block


@kernel
def _widen_row(
    source: int, target: int, whole: int, ahead: int, planes: int, terms: int, terms_plane: int, left: int,
    group: int,
) -> None:  # fmt: skip
    """A row of bytes as float32, each plane half a band after the last one."""
    if group == 0:
        _widen(source, target, whole, ahead, 0, 0, 0)
        return
    plane_bytes = _BAND // 2 * RUN * 4
    begin, end = 0, min(left, whole)
    while begin < whole:
        at, out = source + begin, target + begin * 4
        if planes == 1:
            _widen_groups(at, out, end - begin, ahead, 0, terms, 0)
        else:
            _widen_nibbles(at, out, end - begin, ahead, plane_bytes, terms, terms_plane)
        begin, end = end, min(end + group, whole)
        terms += 8


@kernel
def _rest_of_rows(
    count: int, tokens: int, w: int, w_stride: int, x: int, x_stride: int, begin: int, end: int, y: int,
    room: int,
) -> None:  # fmt: skip
    """Adds the products of the last int8 of rows whose length is no multiple of a tile's step."""
    wide = carray(floats_at(room), (RUN,))
    for line in range(count):
        for column in range(begin, end):
            wide[column] = integer_at(w + line * w_stride + column)
        add_rest(1, tokens, room, RUN, x, x_stride, begin, end, y + line * MAX_TOKENS * 4, False)


def linear_quantized_numpy(
    x: NDArray[np.float32],
    w: NDArray[np.int8],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The kernel's twin, in its order of summation.

    Args:
        x: float32, shape (tokens, length).
        w: Integers, shape (rows, length), one for each weight.
        scale: float32, shape (rows, groups); without `shift` (rows, 1), and the sums are scaled.
        shift: float32, shape (rows, groups), added to scaled weights, or None.
        bias: float32, shape (rows,), or None.

    Returns:
        float32, shape (tokens, rows).
    """
    if shift is None:
        out = linear_numpy(x, w.astype(np.float32)) * scale[:, 0]
        return out if bias is None else out + bias
    each = w.shape[1] // scale.shape[1]
    scale, shift = np.repeat(scale, each, axis=1), np.repeat(shift, each, axis=1)
    # Exact in float64, then rounded once, as a fused multiply-add is.
    wide = (w.astype(np.float64) * scale + shift).astype(np.float32)
    return linear_numpy(x, wide, bias)
