"""y = x Wᵀ + b for few tokens and quantised weights, which are read once, as the integers that they are.

As in `linear` the threads claim blocks of rows. Up to four tokens are multiplied with weights that become
float32 in registers, and int8 with some more; for many a band of rows is widened into the nearest cache, once
for all tokens. Either way the order of the sums is that of `linear`.
"""

from __future__ import annotations

from numba.np.numpy_support import carray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.engine.cpu._kernels.linear import (
    BLOCK,
    MAX_TOKENS,
    RUN,
    TILE,
    add_rest,
    fetches,
    floats,
    groups_of,
    run_length_of,
    write,
)
from retrieval_draft.engine.cpu._kernels.quantized_tile import (
    integer_at,
    quantized_tile,
    widen_integers,
)
from retrieval_draft.engine.cpu._kernels.vector_tile import STEP, claim, floats_at, integers_at, stack_floats

__all__ = [
    "QUANTIZED_JOB",
    "linear_quantized",
]

QUANTIZED_JOB = 16
"""int64 fields of a job."""

_GROUP = 4
"""Most tokens multiplied with weights that are widened in registers."""

_ROWS, _ROWS_OF_NIBBLES = (8, 4, 3, 3), (4, 2, 1, 1)
"""Rows of a tile, by tokens."""

_OFTEN = 4
"""Groups of tokens for which int8 are widened in registers: measured, more are better widened once."""

_BAND = 6
"""Rows of weights widened at a time."""

_SUMS = 2 * BLOCK * MAX_TOKENS
_WIDE = _BAND * RUN
_SINGLE = (1,) * _GROUP

_integer_tile, _integer_line = (quantized_tile(rows, 1, False, BLOCK) for rows in (_ROWS, _SINGLE))
_group_tile, _group_line = (quantized_tile(rows, 1, True, BLOCK) for rows in (_ROWS, _SINGLE))
_nibble_tile, _nibble_line = (quantized_tile(rows, 2, True, BLOCK) for rows in (_ROWS_OF_NIBBLES, _SINGLE))
_widen, _widen_groups, _widen_nibbles = (
    widen_integers(1, False), widen_integers(1, True), widen_integers(2, True),
)  # fmt: skip


@kernel
def _rows_of(tokens: int, planes: int) -> int:
    """Rows of a tile of so many tokens."""
    return _ROWS[tokens - 1] if planes == 1 else _ROWS_OF_NIBBLES[tokens - 1]


@kernel
def _multiply(
    is_tile: bool, tokens: int, w: int, w_stride: int, x: int, x_stride: int, length: int, y: int, near: int,
    far: int, planes: int, terms: int, terms_stride: int, terms_plane: int, left: int, group: int,
) -> None:  # fmt: skip
    """A tile, or one row, with one group of tokens; the scale of int8 without groups is left for the sums."""
    s, t, p = MAX_TOKENS, terms_stride, terms_plane
    if group == 0:
        if is_tile:
            _integer_tile(tokens, w, w_stride, x, x_stride, length, y, s, near, far, 0, 0, 0, 0, 0)
        else:
            _integer_line(tokens, w, w_stride, x, x_stride, length, y, s, near, far, 0, 0, 0, 0, 0)
    elif planes == 1:
        if is_tile:
            _group_tile(tokens, w, w_stride, x, x_stride, length, y, s, near, far, terms, t, 0, left, group)
        else:
            _group_line(tokens, w, w_stride, x, x_stride, length, y, s, near, far, terms, t, 0, left, group)
    elif is_tile:
        _nibble_tile(tokens, w, w_stride, x, x_stride, length, y, s, near, far, terms, t, p, left, group)
    else:
        _nibble_line(tokens, w, w_stride, x, x_stride, length, y, s, near, far, terms, t, p, left, group)


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
    band = _rows_of(tokens, planes) if groups == 1 else _BAND // planes
    wide_groups = groups_of(tokens)
    run_length = run_length_of(length)
    blocks = (lines + size - 1) // size
    block = claim(job)
    while block < blocks:
        next_block = claim(job)
        following = next_block * size if next_block < blocks else -1
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
                near, far = fetches(row, band, first, last, following, run, run + run_length, length, stride)
                first_term = terms
                if group:
                    first_term += (row * terms_stride + run // group * 2) * 4
                if in_registers:
                    begin = 0
                    for part_of_tokens in range(groups):
                        after = tokens * (part_of_tokens + 1) // groups
                        some = after - begin
                        tile_rows = _rows_of(some, planes)
                        given = x + (begin * length + run) * 4
                        line = row
                        while line < end:
                            count = tile_rows if end - line >= tile_rows else 1
                            _multiply(
                                count == tile_rows, some, start + (line - row) * stride, stride, given,
                                length, whole, sums_at + ((line - first) * MAX_TOKENS + begin) * 4, near, far,
                                planes, first_term + (line - row) * terms_stride * 4, terms_stride,
                                terms_plane, left, group,
                            )  # fmt: skip
                            line += count
                        begin, near, far = after, 0, 0
                else:
                    for line in range(row, end):
                        _widen_row(
                            w + line * stride + run, wide_at + (line - row) * RUN * 4, whole, near, far,
                            planes, first_term + (line - row) * terms_stride * 4, terms_plane, left, group,
                        )  # fmt: skip
                    begin = 0
                    for part_of_tokens in range(wide_groups):
                        after = tokens * (part_of_tokens + 1) // wide_groups
                        given = x + (begin * length + run) * 4
                        for plane in range(planes):
                            line = row
                            while line < end:
                                count = TILE if end - line >= TILE else 1
                                at = wide_at + (plane * band + line - row) * RUN * 4
                                out = sums_at + ((plane * BLOCK + line - first) * MAX_TOKENS + begin) * 4
                                floats(count, after - begin, at, RUN, given, length, whole, out, 0, 0)
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
            plane_at = sums_at + plane * BLOCK * MAX_TOKENS * 4
            write(plane_at, last - first, tokens, bias, y, rows, from_row, half)
        block = next_block


@kernel
def _widen_row(
    source: int, target: int, whole: int, near: int, far: int, planes: int, terms: int, terms_plane: int,
    left: int, group: int,
) -> None:  # fmt: skip
    """A row of bytes as float32, each plane half a band after the last one."""
    if group == 0:
        _widen(source, target, whole, near, far, 0, 0, 0)
        return
    plane_bytes = _BAND // 2 * RUN * 4
    begin, end = 0, min(left, whole)
    while begin < whole:
        at, out = source + begin, target + begin * 4
        if planes == 1:
            _widen_groups(at, out, end - begin, near, far, 0, terms, 0)
        else:
            _widen_nibbles(at, out, end - begin, near, far, plane_bytes, terms, terms_plane)
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
