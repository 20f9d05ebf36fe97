"""Register tiles over quantised weights: integers are read from memory and become float32 in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from retrieval_draft.engine.cpu._kernels.vector_tile import (
    LANES,
    STEP,
    add_lane_sums,
    cgutils,
    each_count,
    intrinsic,
    load,
    long,
    multiply_add_of,
    offset_by,
    prefetch,
    spread,
    types,
)

__all__ = ["integer_at", "quantized_tile", "widen_integers"]

_LINE = 64
_FLOAT, _BYTE, _INT = ir.FloatType(), ir.IntType(8), ir.IntType(32)
_LONG = ir.IntType(64)
_VECTOR, _QUARTET = ir.VectorType(_FLOAT, LANES), ir.VectorType(_FLOAT, 4)
_BYTES, _INTS = ir.VectorType(_BYTE, LANES), ir.VectorType(_INT, LANES)


def quantized_tile(rows: Sequence[int], planes: int, grouped: bool, plane_stride: int) -> Any:
    """Makes a tile as `vector_tile.dot_tile` is one, over weights of one byte, or of half a byte.

    ``tile(tokens, w, w_stride, x, x_stride, length, y, y_stride, near, far, terms, terms_stride, terms_plane,
    left, group)`` adds to y[r, t] the dot product of weight row r and token t, in the order of sums of
    `dot_tile` on the widened weights. With two planes the bytes of row r hold two weight rows, that of the
    lower halves (r) and that of the upper ones, whose sums go to y[plane_stride + r].

    The integers of one plane are signed, those of two are 0 to 15. With `grouped` a q stands for q · scale +
    offset, rounded once; those of a group of elements are two floats beside each other in `terms`.

    Args:
        rows: Rows of bytes, 1 to 8, for 1, 2, ... tokens.
        planes: 1 or 2.
        grouped: Whether scale and offset are applied here.
        plane_stride: Rows of y between planes.

    Returns:
        The function. Addresses are intp; w_stride, `near`, `far` are in bytes, the other strides in floats;
        `length` is a multiple of `STEP`, and so are `left`, the elements left of the first group, and
        `group`; `terms` is the address of the first group's terms in the first row and plane.
    """

    @intrinsic
    def tile(
        context: Any, tokens: Any, w: Any, w_stride: Any, x: Any, x_stride: Any, length: Any, y: Any,
        y_stride: Any, near: Any, far: Any, terms: Any, terms_stride: Any, terms_plane: Any, left: Any,
        group: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            tokens, *others = arguments
            for count in each_count(builder, tokens, len(rows)):
                _quantized_tile(builder, rows[count - 1], count, planes, grouped, plane_stride, *others)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 15), generate

    return tile


def _quantized_tile(
    builder: Any, rows: int, tokens: int, planes: int, grouped: bool, plane_stride: int, w: Any,
    w_stride: Any, x: Any, x_stride: Any, length: Any, y: Any, y_stride: Any, near: Any, far: Any, terms: Any,
    terms_stride: Any, terms_plane: Any, left: Any, group: Any,
) -> None:  # fmt: skip
    multiply_add = multiply_add_of(builder)
    cells = [(plane, row, token) for plane in range(planes) for row in range(rows) for token in range(tokens)]
    w_rows = [offset_by(builder, w, w_stride, row) for row in range(rows)]
    x_rows = [offset_by(builder, x, x_stride, 4 * token) for token in range(tokens)]
    t_rows = {
        (plane, row): offset_by(
            builder, offset_by(builder, long(0), terms_plane, 4 * plane), terms_stride, 4 * row
        )
        for plane in range(planes)
        for row in range(rows)
    }

    entry = builder.block
    loop, done = builder.append_basic_block("quantized.loop"), builder.append_basic_block("quantized.done")
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    builder.cbranch(builder.icmp_signed(">", length, long(0)), loop, done)

    builder.position_at_end(loop)
    column = builder.phi(_LONG)
    column.add_incoming(long(0), entry)
    starts = {cell: builder.phi(_VECTOR) for cell in cells}
    term, rest = builder.phi(_LONG), builder.phi(_LONG)
    term.add_incoming(terms, entry)
    rest.add_incoming(left, entry)
    sums: dict[tuple[int, int, int], Any] = dict(starts)
    # A step of a row is half a line or less: lines of the whole tile are fetched as they lie in memory.
    lines = builder.add(w, builder.mul(column, long(rows)))
    for line in range(0, rows * STEP, _LINE):
        prefetch(builder, builder.add(lines, long(line)), near, far)
    x_here = builder.mul(column, long(4))
    inputs = [
        [builder.add(builder.add(x_row, x_here), long(4 * part * LANES)) for part in range(STEP // LANES)]
        for x_row in x_rows
    ]
    for row in range(rows):
        begin = builder.add(w_rows[row], column)
        for part in range(STEP // LANES):
            address = builder.add(begin, long(part * LANES))
            weights = _widened(builder, load(builder, address, _BYTES, 1), planes)
            for plane, weight in enumerate(weights):
                if grouped:
                    scale, shift = _terms(builder, builder.add(term, t_rows[plane, row]))
                    weight = builder.call(multiply_add, [weight, scale, shift])
                for token in range(tokens):
                    given = load(builder, inputs[token][part], _VECTOR, 4)
                    cell = plane, row, token
                    sums[cell] = builder.call(multiply_add, [weight, given, sums[cell]])
    after = builder.add(column, long(STEP))
    column.add_incoming(after, loop)
    fewer = builder.sub(rest, long(STEP))
    ends = builder.icmp_signed("<=", fewer, long(0))
    rest.add_incoming(builder.select(ends, group, fewer), loop)
    term.add_incoming(builder.select(ends, builder.add(term, long(8)), term), loop)
    for cell in cells:
        starts[cell].add_incoming(zero, entry)
        starts[cell].add_incoming(sums[cell], loop)
    builder.cbranch(builder.icmp_signed("<", after, length), loop, done)

    builder.position_at_end(done)
    for cell in cells:
        vector = builder.phi(_VECTOR)
        vector.add_incoming(zero, entry)
        vector.add_incoming(sums[cell], loop)
        sums[cell] = vector
    for plane in range(planes):
        for row in range(rows):
            line = offset_by(builder, y, y_stride, 4 * (plane * plane_stride + row))
            add_lane_sums(builder, line, [sums[plane, row, token] for token in range(tokens)])


def _widened(builder: Any, data: Any, planes: int) -> list[Any]:
    """A vector of bytes as float32, one vector for each plane."""
    if planes == 1:
        return [builder.sitofp(builder.sext(data, _INTS), _VECTOR)]
    wide = builder.zext(data, _INTS)
    low = builder.and_(wide, ir.Constant(_INTS, [15] * LANES))
    high = builder.lshr(wide, ir.Constant(_INTS, [4] * LANES))
    return [builder.sitofp(half, _VECTOR) for half in (low, high)]


def _terms(builder: Any, address: Any) -> tuple[Any, Any]:
    scale = spread(builder, load(builder, address, _FLOAT, 4))
    return scale, spread(builder, load(builder, builder.add(address, long(4)), _FLOAT, 4))


def widen_integers(planes: int, grouped: bool) -> Any:
    """Makes ``widen(source, target, length, near, far, plane_bytes, terms, terms_plane)``.

    It writes the weights that `quantized_tile` sees in `length` bytes of one group, a multiple of STEP, as
    float32, each plane `plane_bytes` after the last one, and fetches as `dot_tile` does. `terms` is the
    address of the group's terms, `terms_plane` the floats from there to those of the next plane.
    """

    @intrinsic
    def widen(
        context: Any, source: Any, target: Any, length: Any, near: Any, far: Any, plane_bytes: Any,
        terms: Any, terms_plane: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, target, length, near, far, plane_bytes, terms, terms_plane = arguments
            multiply_add = multiply_add_of(builder)
            found = (
                [
                    _terms(builder, offset_by(builder, terms, terms_plane, 4 * plane))
                    for plane in range(planes)
                ]
                if grouped
                else []
            )
            with cgutils.for_range_slice(builder, long(0), length, long(STEP)) as (column, _):
                out, here = offset_by(builder, target, column, 4), builder.add(source, column)
                prefetch(builder, here, near, far)
                for part in range(STEP // LANES):
                    data = load(builder, builder.add(here, long(part * LANES)), _BYTES, 1)
                    for plane, weight in enumerate(_widened(builder, data, planes)):
                        if grouped:
                            weight = builder.call(multiply_add, [weight, *found[plane]])
                        address = builder.add(
                            offset_by(builder, out, plane_bytes, plane), long(4 * part * LANES)
                        )
                        builder.store(weight, builder.inttoptr(address, _VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return widen


@intrinsic
def integer_at(context: Any, address: Any) -> Any:
    """The int8 at an address, as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(load(builder, arguments[0], _BYTE, 1), _FLOAT)

    return types.float32(types.intp), generate
