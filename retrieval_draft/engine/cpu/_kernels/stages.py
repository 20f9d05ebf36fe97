"""The work between a decoder layer's matrices, and a job of several stages that threads go through together.

Each parallel section costs its launch and its end, which for the matrices of a small model is as much as the
matrix. A section of stages pays once: threads share each stage's blocks and begin the next when all are
finished. No thread waits for one that has not begun: it finds nothing to claim when it comes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.engine.cpu._kernels.linear import GROUP, MAX_TOKENS, TILE, floats, widen_rows
from retrieval_draft.engine.cpu._kernels.linear_amx import pack_pairs
from retrieval_draft.engine.cpu._kernels.linear_tokenwise import multiply, rows_of
from retrieval_draft.engine.cpu._kernels.norm import norm_row, read_row, round_bfloat16, write_row
from retrieval_draft.engine.cpu._kernels.vector_tile import (
    LANES,
    STEP,
    bytes_at,
    claim,
    doubles_at,
    floats_at,
    integers_at,
    intrinsic,
    long,
    stack_floats,
    types,
)

__all__ = [
    "CHUNK", "ENTRY", "GELU_TANH", "MAX_HEAD", "MAX_QUERIES", "MAX_ROW", "SILU", "add_and_norm", "attend",
    "fill", "gate", "head_positions", "layout", "run_stages",
]  # fmt: skip

ENTRY = 4
"""int64 fields of an entry of `run_stages`."""

SILU, GELU_TANH = 0, 1
"""Activations of `gate`."""

CHUNK = 512
"""Columns that a thread claims at once in `gate` and `layout`: a multiple of `STEP`."""

MAX_HEAD = 512
"""Largest dimension of a head in `head_positions`."""

MAX_ROW = 16384
"""Longest row of `add_and_norm`."""

_ROWS = MAX_TOKENS * CHUNK

MAX_QUERIES = 12
"""Most queries that a thread takes at once in `attend`."""

_VECTORS = 4
_QUERIES = MAX_QUERIES * MAX_HEAD
_SCORES = MAX_QUERIES * MAX_TOKENS
_SLICES = MAX_HEAD // (_VECTORS * LANES)
_TOTALS = _SLICES * MAX_QUERIES * MAX_TOKENS
_WIDE = MAX_HEAD * MAX_TOKENS
_STATE = 2 * MAX_QUERIES
_LOWEST = np.float32(-3e38)


@intrinsic
def _call(context: Any, address: Any, argument: Any) -> Any:
    """Calls the C function of one integer at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def _count(context: Any, address: Any) -> Any:
    """Adds one to the int64 at an address; what this thread wrote before is seen by who sees the sum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.atomic_rmw("add", pointer, long(1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _seen(context: Any, address: Any) -> Any:
    """The int64 at an address, read atomically."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.intp), generate


@kernel
def fill(
    template: NDArray[np.int64],
    slots: NDArray[np.int64],
    bases: NDArray[np.int64],
    addresses: NDArray[np.int64],
    words: NDArray[np.int64],
) -> None:
    """Writes a program's words: the template, with the address of its base added to some.

    Args:
        template: int64, shape (words,).
        slots: int64, shape (known,). Words to which an address is added.
        bases: int64, shape (known,). Index of the address of each.
        addresses: int64, shape (bases,).
        words: int64, shape (words,). Written.

    Example:
        template 5 7 9, slots 0 2, bases 1 0, addresses 100 200: words 205 7 109
    """
    words[:] = template
    for index in range(len(slots)):
        words[slots[index]] += addresses[bases[index]]


def run_stages(program: int) -> None:
    """One thread's way through a program of jobs, in order.

    Args:
        program: Address of int64: [0] the number of entries, then ENTRY fields for each: [0] address of a C
            function of one integer, which works on blocks of a job that threads claim and returns when none
            is left, or 0 for a barrier: here a thread waits until all entries before are finished; [1] the
            job's address; [2], [3] threads that entered and left the entry, 0 at the start.
    """
    count = carray(integers_at(program), (1,))[0]
    entries = carray(integers_at(program + 8), (count, ENTRY))
    first = 0
    for index in range(count):
        at = program + 8 + index * ENTRY * 8
        if entries[index, 0] != 0:
            _count(at + 16)
            _call(entries[index, 0], entries[index, 1])
            _count(at + 24)
            continue
        for before in range(first, index):
            at = program + 8 + before * ENTRY * 8
            # This thread has seen all blocks claimed, each by a thread that had entered. So when as many
            # have left as had entered, all are finished; who enters later finds none.
            left = _seen(at + 24)
            while left != _seen(at + 16):
                left = _seen(at + 24)
        first = index + 1


@kernel
def _order(column: int, whole: int) -> int:
    """The index of a column where each `STEP` columns before `whole` have those at even indices first."""
    if column >= whole:
        return column
    within = column % STEP
    return column - within + (within >> 1) + (within & 1) * LANES


def add_and_norm(job: int) -> None:
    """A token's vector, normed, added to the residual, and normed for the next matrix. A block is a token.

    Of x, residual r, scales a and b: h = r + norm(x; a), y = norm(h; b), each step rounded to the type.

    Args:
        job: Address of int64: [0] the next block; addresses of [1] x, (tokens, length), [2] r, of that shape,
            or 0, [3] a, float32 (length,), or 0, [4] h, written, or 0, [5] b, or 0, [6] y, float32, written
            if there is b; [7] tokens, [8] length, at most `MAX_ROW`; [9] eps of a and [10] of b as bits of
            float64; [11] whether a is scaled by after rounding, [12] b; [13] whether x, r and h are bfloat16,
            else they are float32; [14] whether y has even indices of each `STEP` first.
    """
    field = carray(integers_at(job), (15,))
    tokens, length, half, ordered = field[7], field[8], field[13] != 0, field[14] != 0
    size = 2 if half else 4
    eps = carray(doubles_at(job + 72), (2,))
    row_at, other_at = stack_floats(MAX_ROW), stack_floats(MAX_ROW)
    row, other = carray(floats_at(row_at), (length,)), carray(floats_at(other_at), (length,))
    whole = length - length % STEP
    token = claim(job)
    while token < tokens:
        begin = token * length * size
        read_row(field[1] + begin, row_at, length, half)
        if field[3] != 0:
            norm_row(row_at, field[3], length, eps[0], field[11] != 0, half)
        if field[2] != 0:
            read_row(field[2] + begin, other_at, length, half)
            for column in range(length):
                row[column] += other[column]
            if half:
                for column in range(length):
                    row[column] = round_bfloat16(row[column])
        if field[4] != 0:
            write_row(row_at, field[4] + begin, length, half)
        if field[5] != 0:
            norm_row(row_at, field[5], length, eps[1], field[12] != 0, half)
            out = carray(floats_at(field[6] + token * length * 4), (length,))
            if ordered:
                for column in range(length):
                    out[_order(column, whole)] = row[column]
            else:
                for column in range(length):
                    out[column] = row[column]
        token = claim(job)


@kernel
def _exponentials(x: NDArray[np.float32], powers: NDArray[np.int32], y: NDArray[np.float32]) -> None:
    """Y = exp(x) to two units in the last place, by the polynomial of Cephes' expf, without a branch.

    Args:
        x: float32, shape (n,), changed.
        powers: int32, shape (n,), scratch.
        y: float32, shape (n,), written; x beyond ±87 is taken as that.
    """
    for index in range(len(x)):
        value = min(max(x[index], np.float32(-87.0)), np.float32(87.0))
        power = np.rint(value * np.float32(1.44269504088896341))
        rest = value - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
        total = np.float32(1.9875691500e-4)
        total = total * rest + np.float32(1.3981999507e-3)
        total = total * rest + np.float32(8.3334519073e-3)
        total = total * rest + np.float32(4.1665795894e-2)
        total = total * rest + np.float32(1.6666665459e-1)
        total = total * rest + np.float32(5.0000001201e-1)
        y[index] = total * rest * rest + rest + np.float32(1.0)
        powers[index] = (np.int32(power) + np.int32(127)) << np.int32(23)
    scales = powers.view(np.float32)
    for index in range(len(x)):
        y[index] *= scales[index]


def gate(job: int) -> None:
    """The product f(g) · u, each step rounded to the type; f is SiLU, or GELU by tanh.

    A block is `CHUNK` columns of a token. Both f are g / (1 + exp(-z)): with z = g, and with
    z = 2 · sqrt(2 / π) · (g + 0.044715 g³).

    Args:
        job: Address of int64: [0] the next block; addresses of [1] g and [2] u, (tokens, length), and [3] y,
            float32, written; [4] tokens, [5] length, [6] `SILU` or `GELU_TANH`, [7] whether g and u are
            bfloat16, else they are float32; [8] whether y has even indices of each `STEP` first.
    """
    field = carray(integers_at(job), (9,))
    tokens, length, half, ordered = field[4], field[5], field[7] != 0, field[8] != 0
    size = 2 if half else 4
    g_at, z_at, y_at, bits_at = (
        stack_floats(CHUNK), stack_floats(CHUNK), stack_floats(CHUNK), stack_floats(CHUNK),
    )  # fmt: skip
    whole = length - length % STEP
    chunks = (length + CHUNK - 1) // CHUNK
    block = claim(job)
    while block < tokens * chunks:
        token, first = block // chunks, block % chunks * CHUNK
        count = min(CHUNK, length - first)
        begin = (token * length + first) * size
        g, z = carray(floats_at(g_at), (count,)), carray(floats_at(z_at), (count,))
        y = carray(floats_at(y_at), (count,))
        powers = carray(floats_at(bits_at), (count,)).view(np.int32)
        read_row(field[1] + begin, g_at, count, half)
        if field[6] == SILU:
            for column in range(count):
                z[column] = -g[column]
        else:
            for column in range(count):
                cube = g[column] * g[column] * g[column]
                z[column] = np.float32(-1.5957691216) * (g[column] + np.float32(0.044715) * cube)
        _exponentials(z, powers, y)
        for column in range(count):
            y[column] = g[column] / (np.float32(1.0) + y[column])
        read_row(field[2] + begin, z_at, count, half)
        if half:
            for column in range(count):
                y[column] = round_bfloat16(round_bfloat16(y[column]) * z[column])
        else:
            for column in range(count):
                y[column] *= z[column]
        out = carray(floats_at(field[3] + token * length * 4), (length,))
        if ordered:
            for column in range(count):
                out[_order(first + column, whole)] = y[column]
        else:
            for column in range(count):
                out[first + column] = y[column]
        block = claim(job)


def head_positions(job: int) -> None:
    """Norms the heads of queries, keys or values, and rotates their halves by position. A block is a token.

    Of a head's halves a and b: (a, b) · cos + (-b, a) · sin, each step rounded to the type.

    Args:
        job: Address of int64: [0] the next block; [1] address of x, (tokens, heads, dim); [2] address of the
            norm's scale, float32 (dim,), or 0; addresses of [3] cos and [4] sin, (tokens, dim), or 0; [5]
            tokens, [6] heads, [7] dim, even, at most `MAX_HEAD`; [8] eps as bits of float64; [9] whether the
            norm rounds before it scales; [10] whether all are bfloat16, else float32; [11] address of the
            output, which may be x; elements there [12] from a head to the next, [13] from a token to the
            next.
    """
    field = carray(integers_at(job), (14,))
    tokens, heads, dim, half = field[5], field[6], field[7], field[10] != 0
    size, middle = 2 if half else 4, field[7] // 2
    eps = carray(doubles_at(job + 64), (1,))[0]
    x_at, cos_at, sin_at = stack_floats(MAX_HEAD), stack_floats(MAX_HEAD), stack_floats(MAX_HEAD)
    x = carray(floats_at(x_at), (dim,))
    cos, sin = carray(floats_at(cos_at), (dim,)), carray(floats_at(sin_at), (dim,))
    token = claim(job)
    while token < tokens:
        if field[3] != 0:
            read_row(field[3] + token * dim * size, cos_at, dim, half)
            read_row(field[4] + token * dim * size, sin_at, dim, half)
        for head in range(heads):
            read_row(field[1] + (token * heads + head) * dim * size, x_at, dim, half)
            if field[2] != 0:
                norm_row(x_at, field[2], dim, eps, field[9] != 0, half)
            for column in range(middle if field[3] != 0 else 0):
                a, b = x[column], x[middle + column]
                if half:
                    x[column] = round_bfloat16(a * cos[column]) + round_bfloat16(-b * sin[column])
                    x[middle + column] = round_bfloat16(b * cos[middle + column]) + round_bfloat16(
                        a * sin[middle + column]
                    )
                else:
                    x[column] = a * cos[column] - b * sin[column]
                    x[middle + column] = b * cos[middle + column] + a * sin[middle + column]
            write_row(x_at, field[11] + (token * field[13] + head * field[12]) * size, dim, half)
        token = claim(job)


def attend(job: int) -> None:
    """Attention of few queries over keys that all of them may see, but for a mask.

    A block is some of the queries, of any head, that read the same head of keys: bfloat16 keys are widened
    once for all of them. Keys are taken `MAX_TOKENS` at a time: scores are exponentiated below the largest so
    far, and sums that were made below a smaller one are scaled (online softmax, Milakov and Gimelshein 2018).

    Args:
        job: Address of int64: [0] the next block; addresses of [1] queries, (tokens, heads, dim), [2] keys
            and [3] values, rows of dim elements, and [4] the mask, added to scores, rows of keys, or 0;
            [5] address of the output, (tokens, heads, dim), written; [6] tokens, [7] heads, [8] dim, a
            multiple of `STEP`, at most `MAX_HEAD`, [9] keys; [10], [11] elements from one head of keys and
            of values to the next; [12] elements from a row of the mask to the next; [13] heads of queries
            for one of keys; [14] the scale of scores as bits of float64; [15] whether all are bfloat16, else
            float32; [16] whether the mask is of bool, one byte each, true for what is seen; [17] queries of
            a block, at most `MAX_QUERIES`.
    """
    field = carray(integers_at(job), (18,))
    tokens, heads, dim, keys, half = field[6], field[7], field[8], field[9], field[15] != 0
    size = 2 if half else 4
    scale = np.float32(carray(doubles_at(job + 112), (1,))[0])
    query_at, score_at, total_at = stack_floats(_QUERIES), stack_floats(_SCORES), stack_floats(_TOTALS)
    key_at, value_at, mask_at, bits_at = (
        stack_floats(_WIDE), stack_floats(_WIDE), stack_floats(MAX_TOKENS), stack_floats(MAX_TOKENS),
    )  # fmt: skip
    query = carray(floats_at(query_at), (MAX_QUERIES, dim))
    scores = carray(floats_at(score_at), (MAX_QUERIES, MAX_TOKENS))
    totals = carray(floats_at(total_at), (_SLICES, MAX_QUERIES, MAX_TOKENS))
    shifted = carray(floats_at(mask_at), (MAX_TOKENS,))
    powers = carray(floats_at(bits_at), (MAX_TOKENS,)).view(np.int32)
    state_at = stack_floats(_STATE)
    state = carray(floats_at(state_at), (2, MAX_QUERIES))
    largest, weight = state[0], state[1]
    times, size_of_group = field[13], field[17]
    queries = times * tokens
    groups = (queries + size_of_group - 1) // size_of_group
    columns = _VECTORS * LANES
    slices = (dim + columns - 1) // columns
    block = claim(job)
    while block < heads // times * groups:
        group, first = block // groups, block % groups * size_of_group
        count = min(size_of_group, queries - first)
        for row in range(count):
            head, token = group * times + (first + row) // tokens, (first + row) % tokens
            at = field[1] + (token * heads + head) * dim * size
            read_row(at, query_at + row * dim * 4, dim, half)
            for column in range(dim):
                query[row, column] *= scale
            largest[row], weight[row] = _LOWEST, np.float32(0.0)
            for part in range(slices):
                for column in range(columns):
                    totals[part, row, column] = 0.0
        for begin in range(0, keys, MAX_TOKENS):
            some = min(MAX_TOKENS, keys - begin)
            key = field[2] + (group * field[10] + begin * dim) * size
            value = field[3] + (group * field[11] + begin * dim) * size
            if half:
                read_row(key, key_at, some * dim, True)
                read_row(value, value_at, some * dim, True)
                key, value = key_at, value_at
            for row in range(count):
                for column in range(MAX_TOKENS):
                    scores[row, column] = 0.0
            row = 0
            while row < count:
                rows = TILE if count - row >= TILE else 1
                for column in range(0, some, GROUP):
                    at = score_at + (row * MAX_TOKENS + column) * 4
                    floats(
                        rows, min(GROUP, some - column), query_at + row * dim * 4, dim,
                        key + column * dim * 4, dim, dim, at, 0, 0,
                    )  # fmt: skip
                row += rows
            for row in range(count):
                if field[4] != 0:
                    at = field[4] + (first + row) % tokens * field[12] * (1 if field[16] else size)
                    if field[16]:
                        seen = carray(bytes_at(at), (keys,))
                        for column in range(some):
                            if seen[begin + column] == 0:
                                scores[row, column] = _LOWEST
                    else:
                        read_row(at + begin * size, mask_at, some, half)
                        for column in range(some):
                            scores[row, column] = max(scores[row, column] + shifted[column], _LOWEST)
                most = largest[row]
                for column in range(some):
                    most = max(most, scores[row, column])
                factor = np.exp(largest[row] - most)
                for column in range(some):
                    shifted[column] = scores[row, column] - most
                _exponentials(shifted[:some], powers[:some], scores[row, :some])
                total = np.float32(0.0)
                for column in range(some):
                    total += scores[row, column]
                weight[row] = weight[row] * factor + total
                largest[row] = most
                for part in range(slices):
                    for column in range(columns):
                        totals[part, row, column] *= factor
            for part in range(slices):
                vectors = min(_VECTORS, dim // LANES - part * _VECTORS)
                tile = rows_of(vectors)
                row = 0
                while row < count:
                    rows = tile if count - row >= tile else 1
                    at = score_at + row * MAX_TOKENS * 4
                    multiply(
                        rows, vectors, at, MAX_TOKENS, value + part * columns * 4, dim, some,
                        total_at + (part * MAX_QUERIES + row) * MAX_TOKENS * 4, 0, 0,
                    )  # fmt: skip
                    row += rows
        for row in range(count):
            factor = np.float32(1.0) / weight[row]
            for part in range(slices):
                for column in range(min(columns, dim - part * columns)):
                    query[row, part * columns + column] = totals[part, row, column] * factor
            head, token = group * times + (first + row) // tokens, (first + row) % tokens
            at = field[5] + (token * heads + head) * dim * size
            write_row(query_at + row * dim * 4, at, dim, half)
        block = claim(job)


def layout(job: int) -> None:
    """Brings inputs of a matrix into the order that its kernel reads. A block is `CHUNK` columns.

    Args:
        job: Address of int64: [0] the next block; addresses of [1] x, (tokens, length), and [2] y, float32,
            written; [3] tokens, [4] length, [5] whether x is bfloat16, else float32; [6] columns of a
            packed y, (length, columns), with zeros after the tokens, or 0 for y as x, (tokens, length);
            [7] whether x is bfloat16 and y has even indices of each `STEP` first; [8] whether y is packed by
            `pack_pairs`, of rows whose even indices come first.
    """
    field = carray(integers_at(job), (9,))
    tokens, length, half, width, ordered = field[3], field[4], field[5] != 0, field[6], field[7] != 0
    size = 2 if half else 4
    row_at = stack_floats(_ROWS)
    rows = carray(floats_at(row_at), (MAX_TOKENS, CHUNK))
    block = claim(job)
    while block * CHUNK < length:
        first = block * CHUNK
        count = min(CHUNK, length - first)
        for token in range(tokens):
            source = field[1] + (token * length + first) * size
            target = row_at + token * CHUNK * 4 if width else field[2] + (token * length + first) * 4
            if half and ordered:
                widen_rows(source, target, 1, count)
            else:
                read_row(source, target, count, half)
        if field[8] != 0:
            pack_pairs(row_at, CHUNK, field[2] + first // 2 * width * 4, tokens, count, width)
        elif width:
            out = carray(floats_at(field[2]), (length, width))
            for column in range(count):
                for token in range(tokens):
                    out[first + column, token] = rows[token, column]
                for token in range(tokens, width):
                    out[first + column, token] = 0.0
        block = claim(job)
