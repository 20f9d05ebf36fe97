"""Register tiles for products of few tokens, as LLVM vectors, which numba's own loops do not guarantee.

numba leaves the vectorisation of a plain loop to LLVM. The number of accumulators in registers decides the
speed here, so tiles are written out: accumulators of `LANES` floats, each updated by one fused multiply-add a
step. LANES is eight, which LLVM maps to the machine's registers (one of AVX, two of NEON), or sixteen where
there is AVX-512.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils as _cgutils
from numba.core import types as _types
from numba.extending import intrinsic as _intrinsic

__all__ = [
    "LANES",
    "SQUARE",
    "STEP",
    "add_lane_sums",
    "bytes_at",
    "cgutils",
    "claim",
    "dot_tile",
    "doubles_at",
    "each_count",
    "floats_at",
    "integers_at",
    "intrinsic",
    "load",
    "load_bfloat16",
    "long",
    "multiply_add_of",
    "offset_by",
    "outer_tile",
    "prefetch",
    "prefetch_far",
    "spread",
    "stack_floats",
    "store_bfloat16",
    "store_columns",
    "store_pairs",
    "types",
    "widen",
]

LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8
STEP = 2 * LANES
"""Elements of a row that one turn of the loop takes: two vectors."""

# numba has no types for these; the result of `intrinsic` takes the arguments after the first.
intrinsic: Any = _intrinsic
cgutils: Any = _cgutils
types: Any = _types

SQUARE = 8
"""Rows and columns that `store_columns` takes at once."""

_LINE = 64

_FLOAT, _BYTE, _SHORT = ir.FloatType(), ir.IntType(8), ir.IntType(16)
_INT, _LONG = ir.IntType(32), ir.IntType(64)
_VECTOR, _QUARTET, _SQUARE_ROW = (ir.VectorType(_FLOAT, width) for width in (LANES, 4, SQUARE))


def dot_tile(rows: Sequence[int], half: bool = False) -> Any:
    """Makes ``tile(tokens, w, w_stride, x, x_stride, length, y, y_stride, near, far)``, dots in registers.

    The compiled function adds to y[r, t] the dot product of weight row r and token t, for r < rows[tokens-1]
    and t < tokens, 1 to len(rows); of three tokens or more it writes the slots of the next multiple of four,
    and changes nothing in those beyond. Each sum runs in one fixed order, for every tile: a token's result
    does not depend on the tokens beside it.

    Addresses are intp. Strides are in elements, `length` is a multiple of `STEP`. With `half` the weights are
    bfloat16, all else is float32, and of each `STEP` elements of x those at even indices come first.

    `near` and `far` are the distances in bytes from w to the weights that are read next and after these. The
    latter go to the second cache, the former from there to the first, so that neither waits for memory.
    """

    @intrinsic
    def tile(
        context: Any, tokens: Any, w: Any, w_stride: Any, x: Any, x_stride: Any, length: Any, y: Any,
        y_stride: Any, near: Any, far: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            tokens, *others = arguments
            for count in each_count(builder, tokens, len(rows)):
                _dot_tile(builder, rows[count - 1], count, half, *others)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), generate

    return tile


def each_count(builder: Any, count: Any, most: int) -> Iterator[int]:
    """Each number from 1 to `most`, with the builder where the code for this value of `count` belongs."""
    done = builder.append_basic_block("count.done")
    cases = [builder.append_basic_block("count.case") for _ in range(most)]
    switch = builder.switch(count, cases[-1])
    for number, case in enumerate(cases, 1):
        if number < most:
            switch.add_case(long(number), case)
        builder.position_at_end(case)
        yield number
        builder.branch(done)
    builder.position_at_end(done)


def _dot_tile(
    builder: Any, rows: int, tokens: int, half: bool, w: Any, w_stride: Any, x: Any, x_stride: Any,
    length: Any, y: Any, y_stride: Any, near: Any, far: Any,
) -> None:  # fmt: skip
    multiply_add = multiply_add_of(builder)
    cells = [(row, token) for row in range(rows) for token in range(tokens)]
    wide = 2 if half else 4
    w_rows = [offset_by(builder, w, w_stride, wide * row) for row in range(rows)]
    x_rows = [offset_by(builder, x, x_stride, 4 * token) for token in range(tokens)]

    entry = builder.block
    loop, done = builder.append_basic_block("tile.loop"), builder.append_basic_block("tile.done")
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    builder.cbranch(builder.icmp_signed(">", length, long(0)), loop, done)

    builder.position_at_end(loop)
    column = builder.phi(_LONG)
    column.add_incoming(long(0), entry)
    starts = {cell: builder.phi(_VECTOR) for cell in cells}
    sums: dict[tuple[int, int], Any] = dict(starts)
    x_here, w_here = builder.mul(column, long(4)), builder.mul(column, long(wide))
    for w_row in w_rows:
        for line in range(0, STEP * wide, _LINE):
            prefetch(builder, builder.add(builder.add(w_row, w_here), long(line)), near, far)
    shifts = [long(4 * part * LANES) for part in range(STEP // LANES)]
    inputs = [[builder.add(builder.add(x_row, x_here), shift) for shift in shifts] for x_row in x_rows]
    if half:
        for row in range(rows):
            # One row at a time: its weights take two registers.
            for part, weight in enumerate(_load_halves(builder, builder.add(w_rows[row], w_here))):
                for token in range(tokens):
                    given = load(builder, inputs[token][part], _VECTOR, 4)
                    sums[row, token] = builder.call(multiply_add, [weight, given, sums[row, token]])
    else:
        for part, shift in enumerate(shifts):
            weights = [
                load(builder, builder.add(builder.add(w_row, w_here), shift), _VECTOR, 4) for w_row in w_rows
            ]
            for token in range(tokens):
                # One token at a time: 3 x 4 sums, 3 weights and an input are the 16 registers of AVX2.
                given = load(builder, inputs[token][part], _VECTOR, 4)
                for row in range(rows):
                    sums[row, token] = builder.call(multiply_add, [weights[row], given, sums[row, token]])
    after = builder.add(column, long(STEP))
    column.add_incoming(after, loop)
    for cell in cells:
        starts[cell].add_incoming(zero, entry)
        starts[cell].add_incoming(sums[cell], loop)
    builder.cbranch(builder.icmp_signed("<", after, length), loop, done)

    builder.position_at_end(done)
    for row, token in cells:
        vector = builder.phi(_VECTOR)
        vector.add_incoming(zero, entry)
        vector.add_incoming(sums[row, token], loop)
        sums[row, token] = vector
    for row in range(rows):
        line = offset_by(builder, y, y_stride, 4 * row)
        add_lane_sums(builder, line, [sums[row, token] for token in range(tokens)])


def outer_tile(rows: Sequence[int], turns: int) -> Any:
    """Makes ``tile(vectors, w, w_stride, x, x_stride, length, y, y_stride, near, far)``, outer products.

    The compiled function adds to y[r, t] the dot product of weight row r and token t, r < rows[vectors - 1]
    and t < vectors · LANES, with 1 to len(rows) vectors. Tokens lie side by side, x is (length, x_stride):
    nothing is summed across lanes, and a sum is one chain along the row, for every tile.

    All is float32. Addresses are intp. Strides are in elements, `length` is a multiple of `turns` and not
    0, `near` and `far` as in `dot_tile`.
    """

    @intrinsic
    def tile(
        context: Any, vectors: Any, w: Any, w_stride: Any, x: Any, x_stride: Any, length: Any, y: Any,
        y_stride: Any, near: Any, far: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vectors, *others = arguments
            for count in each_count(builder, vectors, len(rows)):
                _outer_tile(builder, rows[count - 1], count, turns, *others)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), generate

    return tile


def _outer_tile(
    builder: Any, rows: int, vectors: int, turns: int, w: Any, w_stride: Any, x: Any, x_stride: Any,
    length: Any, y: Any, y_stride: Any, near: Any, far: Any,
) -> None:  # fmt: skip
    multiply_add = multiply_add_of(builder)
    cells = [(row, part) for row in range(rows) for part in range(vectors)]
    w_rows = [offset_by(builder, w, w_stride, 4 * row) for row in range(rows)]
    lines = [offset_by(builder, y, y_stride, 4 * row) for row in range(rows)]
    outs = {(row, part): builder.add(lines[row], long(4 * LANES * part)) for row, part in cells}
    zero = ir.Constant(_VECTOR, [0.0] * LANES)

    entry = builder.block
    loop, done = builder.append_basic_block("outer.loop"), builder.append_basic_block("outer.done")
    builder.branch(loop)

    builder.position_at_end(loop)
    column = builder.phi(_LONG)
    column.add_incoming(long(0), entry)
    starts = {cell: builder.phi(_VECTOR) for cell in cells}
    sums: dict[tuple[int, int], Any] = dict(starts)
    w_here = builder.mul(column, long(4))
    x_here = builder.add(x, builder.mul(builder.mul(column, x_stride), long(4)))
    for turn in range(turns):
        # A row's line each few products: many at once would find the core's buffers full.
        for row in range(rows * turn // turns, rows * (turn + 1) // turns) if turns > 1 else ():
            prefetch(builder, builder.add(w_rows[row], w_here), near, far)
        line = offset_by(builder, x_here, x_stride, 4 * turn)
        given = [
            load(builder, builder.add(line, long(4 * LANES * part)), _VECTOR, 4) for part in range(vectors)
        ]
        for row in range(rows):
            address = builder.add(builder.add(w_rows[row], w_here), long(4 * turn))
            weight = spread(builder, load(builder, address, _FLOAT, 4))
            for part in range(vectors):
                sums[row, part] = builder.call(multiply_add, [weight, given[part], sums[row, part]])
    after = builder.add(column, long(turns))
    column.add_incoming(after, loop)
    for cell in cells:
        starts[cell].add_incoming(zero, entry)
        starts[cell].add_incoming(sums[cell], loop)
    builder.cbranch(builder.icmp_signed("<", after, length), loop, done)

    builder.position_at_end(done)
    for cell in cells:
        add_at(builder, outs[cell], sums[cell], _VECTOR)


def multiply_add_of(builder: Any) -> Any:
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
    )


def spread(builder: Any, value: Any) -> Any:
    """A float in every lane."""
    alone = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_INT, 0))
    return _shuffled(builder, alone, alone, [0] * LANES)


def add_at(builder: Any, address: Any, value: Any, kind: Any) -> None:
    pointer = builder.inttoptr(address, kind.as_pointer())
    builder.store(builder.fadd(builder.load(pointer, align=4), value), pointer, align=4)


def add_lane_sums(builder: Any, address: Any, vectors: list[Any]) -> None:
    """Adds the sums of the lanes of vectors to floats beside each other."""
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    for first in range(0, len(vectors), 4):
        some, here = vectors[first : first + 4], builder.add(address, long(4 * first))
        if len(vectors) > 2:
            add_at(builder, here, _lane_sums_of_four(builder, [*some, zero, zero, zero][:4]), _QUARTET)
            continue
        for index, vector in enumerate(some):
            add_at(builder, builder.add(here, long(4 * index)), _lane_sum(builder, vector), _FLOAT)


def _lane_sum(builder: Any, vector: Any) -> Any:
    """The sum of the lanes: the upper half is added to the lower one, until one lane is left."""
    width = LANES
    while width > 1:
        vector, width = _folded(builder, vector, width), width // 2
    return builder.extract_element(vector, ir.Constant(_INT, 0))


def _folded(builder: Any, vector: Any, width: int) -> Any:
    low, high = (_shuffled(builder, vector, vector, range(at, at + width // 2)) for at in (0, width // 2))
    return builder.fadd(low, high)


def _lane_sums_of_four(builder: Any, vectors: list[Any]) -> Any:
    """The sums of the lanes of four vectors, in the order of `_lane_sum`, in a third of its instructions."""
    if LANES > 8:
        vectors = [_folded(builder, vector, LANES) for vector in vectors]
    pairs = [
        builder.fadd(
            _shuffled(builder, one, other, (0, 1, 2, 3, 8, 9, 10, 11)),
            _shuffled(builder, one, other, (4, 5, 6, 7, 12, 13, 14, 15)),
        )
        for one, other in (vectors[:2], vectors[2:])
    ]
    # First and third of the four below, second and fourth above: registers of 128 bits are not crossed.
    both = builder.fadd(
        _shuffled(builder, pairs[0], pairs[1], (0, 1, 8, 9, 4, 5, 12, 13)),
        _shuffled(builder, pairs[0], pairs[1], (2, 3, 10, 11, 6, 7, 14, 15)),
    )
    low, high = (_shuffled(builder, both, both, range(at, at + 4)) for at in (0, 4))
    mixed = builder.fadd(
        _shuffled(builder, low, high, (0, 2, 4, 6)), _shuffled(builder, low, high, (1, 3, 5, 7))
    )
    return _shuffled(builder, mixed, mixed, (0, 2, 1, 3))


def _shuffled(builder: Any, one: Any, other: Any, lanes: Sequence[int]) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(_INT, len(lanes)), list(lanes)))


@intrinsic
def widen(context: Any, source: Any, target: Any, length: Any, near: Any, far: Any) -> Any:
    """``widen(source, target, length, near, far)``: bfloat16 to float32, even indices of a step first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, length, near, far = arguments
        with cgutils.for_range_slice(builder, long(0), length, long(STEP)) as (column, _):
            begin = offset_by(builder, source, column, 2)
            prefetch(builder, begin, near, far)
            for part, vector in enumerate(_load_halves(builder, begin)):
                address = builder.add(offset_by(builder, target, column, 4), long(4 * part * LANES))
                builder.store(vector, builder.inttoptr(address, _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@intrinsic
def load_bfloat16(context: Any, address: Any) -> Any:
    """The bfloat16 at an address, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.zext(load(builder, arguments[0], _SHORT, 2), _INT)
        return builder.bitcast(builder.shl(bits, ir.Constant(_INT, 16)), _FLOAT)

    return types.float32(types.intp), generate


@intrinsic
def store_bfloat16(context: Any, address: Any, value: Any) -> Any:
    """Stores a float32 as the nearest bfloat16, ties to even; NaN stays NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, value = arguments
        kept = _to_bfloat16(builder, value)
        builder.store(kept, builder.inttoptr(address, _SHORT.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), generate


def _to_bfloat16(builder: Any, values: Any, width: int = 0) -> Any:
    """A float32, or a vector of `width`, as the nearest bfloat16, ties to even; NaN stays NaN."""

    def each(value: int) -> Any:
        return ir.Constant(ir.VectorType(_INT, width), [value] * width) if width else ir.Constant(_INT, value)

    bits = builder.bitcast(values, each(0).type)
    upper = builder.lshr(bits, each(16))
    odd = builder.and_(upper, each(1))
    rounded = builder.lshr(builder.add(builder.add(bits, each(0x7FFF)), odd), each(16))
    nan = builder.or_(upper, each(0x40))
    kept = builder.select(builder.fcmp_unordered("uno", values, values), nan, rounded)
    return builder.trunc(kept, ir.VectorType(_SHORT, width) if width else _SHORT)


def store_columns(half: bool) -> Any:
    """Makes ``store(rows, rows_stride, columns, y, y_stride)``, which stores a square's columns as rows.

    The compiled function reads `SQUARE` rows of as many floats and stores the first `columns` of the columns,
    in float32, or with `half` in the nearest bfloat16. rows and y are addresses, strides in elements.

    Example:
        A square of 2 with rows 1 2 and 3 4: two columns are stored as 1 3 and 2 4.
    """
    kind = ir.VectorType(_SHORT if half else _FLOAT, SQUARE)
    wide = 2 if half else 4

    @intrinsic
    def store(context: Any, rows: Any, rows_stride: Any, columns: Any, y: Any, y_stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, rows_stride, columns, y, y_stride = arguments
            lines = [
                load(builder, offset_by(builder, rows, rows_stride, 4 * row), _SQUARE_ROW, 4)
                for row in range(SQUARE)
            ]
            for number, column in enumerate(_transposed(builder, lines)):
                with builder.if_then(builder.icmp_signed(">", columns, long(number))):
                    address = builder.inttoptr(
                        offset_by(builder, y, y_stride, wide * number), kind.as_pointer()
                    )
                    kept = _to_bfloat16(builder, column, SQUARE) if half else column
                    builder.store(kept, address, align=wide)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    return store


@intrinsic
def store_pairs(context: Any, rows: Any, rows_stride: Any, y: Any, y_stride: Any) -> Any:
    """``store_pairs(rows, rows_stride, y, y_stride)``: the columns of a square of pairs, as rows of bfloat16.

    Pair p of a row are its float p and that `LANES` after it. rows and y are addresses, strides are in floats
    and in pairs.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, rows_stride, y, y_stride = arguments
        kind = ir.VectorType(_INT, SQUARE)
        lines = []
        for row in range(SQUARE):
            begin = offset_by(builder, rows, rows_stride, 4 * row)
            even, odd = (
                builder.zext(_to_bfloat16(builder, load(builder, at, _SQUARE_ROW, 4), SQUARE), kind)
                for at in (begin, builder.add(begin, long(4 * LANES)))
            )
            pairs = builder.or_(even, builder.shl(odd, ir.Constant(kind, [16] * SQUARE)))
            lines.append(builder.bitcast(pairs, _SQUARE_ROW))
        for number, column in enumerate(_transposed(builder, lines)):
            address = offset_by(builder, y, y_stride, 4 * number)
            builder.store(column, builder.inttoptr(address, _SQUARE_ROW.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """The columns of eight vectors of eight lanes, in three rounds in which pairs change halves."""
    for distance, low in (
        (1, (0, 8, 1, 9, 4, 12, 5, 13)),
        (2, (0, 1, 8, 9, 4, 5, 12, 13)),
        (4, (0, 1, 2, 3, 8, 9, 10, 11)),
    ):
        high = [lane + (4 if distance == 4 else 2) for lane in low]
        mixed = list(rows)
        for row in range(SQUARE):
            if not row & distance:
                pair = rows[row], rows[row + distance]
                mixed[row], mixed[row + distance] = (
                    _shuffled(builder, *pair, lanes) for lanes in (low, high)
                )
        rows = mixed
    return [rows[index] for index in (0, 2, 1, 3, 4, 6, 5, 7)]


@intrinsic
def claim(context: Any, address: Any) -> Any:
    """The int64 at an address, which grows by one, atomically: the next piece of work of a shared job."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _LONG.as_pointer())
        return builder.atomic_rmw("add", pointer, long(1), "monotonic")

    return types.int64(types.intp), generate


@intrinsic
def floats_at(context: Any, address: Any) -> Any:
    """A pointer to float32 from an address, for `numba.carray`."""
    return types.CPointer(types.float32)(types.intp), _to_pointer(_FLOAT)


@intrinsic
def integers_at(context: Any, address: Any) -> Any:
    """A pointer to int64 from an address, for `numba.carray`."""
    return types.CPointer(types.int64)(types.intp), _to_pointer(_LONG)


@intrinsic
def doubles_at(context: Any, address: Any) -> Any:
    """A pointer to float64 from an address, for `numba.carray`."""
    return types.CPointer(types.float64)(types.intp), _to_pointer(ir.DoubleType())


@intrinsic
def bytes_at(context: Any, address: Any) -> Any:
    """A pointer to int8 from an address, for `numba.carray`."""
    return types.CPointer(types.int8)(types.intp), _to_pointer(_BYTE)


def _to_pointer(kind: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], kind.as_pointer())

    return generate


@intrinsic
def stack_floats(context: Any, count: Any) -> Any:
    """The address of `count` floats, a literal, on the stack of the running thread."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    size = count.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # numba's own alloca writes zeros at each call, one instruction each.
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(_FLOAT, size))
        room.align = 64
        return builder.ptrtoint(room, _LONG)

    return types.intp(count), generate


def long(value: int) -> Any:
    return ir.Constant(_LONG, value)


def offset_by(builder: Any, base: Any, stride: Any, scale: int) -> Any:
    return builder.add(base, builder.mul(stride, long(scale)))


def load(builder: Any, address: Any, kind: Any, align: int) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def _load_halves(builder: Any, address: Any) -> tuple[Any, Any]:
    """A step of bfloat16 as two vectors of float32, those at even indices and those at odd ones.

    A bfloat16 is the upper half of a float32's bits: of each pair one is moved up, the other is in place.
    """
    whole = ir.VectorType(_INT, LANES)
    pairs = load(builder, address, whole, 2)
    even = builder.shl(pairs, ir.Constant(whole, [16] * LANES))
    odd = builder.and_(pairs, ir.Constant(whole, [0xFFFF0000] * LANES))
    return builder.bitcast(even, _VECTOR), builder.bitcast(odd, _VECTOR)


def prefetch(builder: Any, address: Any, near: Any, far: Any) -> None:
    """Fetches the line `near` bytes after an address to the first cache, one `far` after to the second."""
    _prefetch(builder, builder.add(address, near), 3)
    prefetch_far(builder, builder.add(address, far))


def prefetch_far(builder: Any, address: Any) -> None:
    """Fetches the line at an address to the second cache."""
    _prefetch(builder, address, 1)


def _prefetch(builder: Any, address: Any, locality: int) -> None:
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT]),
        "llvm.prefetch.p0",
    )
    read, kept, data = (ir.Constant(_INT, value) for value in (0, locality, 1))
    builder.call(function, [builder.inttoptr(address, _BYTE.as_pointer()), read, kept, data])
