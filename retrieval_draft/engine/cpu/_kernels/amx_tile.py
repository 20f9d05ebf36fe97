"""Products of bfloat16 tiles on Intel's matrix unit, AMX, in inline assembly: other ways need passes of LLVM.

A tile register holds 16 rows of 64 bytes. Sums are in tmm0 to tmm3, weights in tmm4 and tmm5, inputs in tmm6
and tmm7; the compiler uses none of them.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config as _config

from retrieval_draft.engine.cpu._kernels.vector_tile import (
    each_count,
    intrinsic,
    long,
    offset_by,
    prefetch_far,
    types,
)

__all__ = ["TILE_COLUMNS", "TILE_ROWS", "amx_tile", "begin_tiles", "end_tiles", "has_amx"]

TILE_ROWS = 16
"""Weight rows of a tile, and tokens of one."""

TILE_COLUMNS = 32
"""Elements of a row in a tile."""

config: Any = _config

_BYTES = 64
_BYTE, _LONG = ir.IntType(8), ir.IntType(64)

# Palette 1; eight tiles of _BYTES columns and TILE_ROWS rows.
_CONFIGURATION = [1, *[0] * 15, *[_BYTES, 0] * 8, *[0] * 16, *[TILE_ROWS] * 8, *[0] * 8]

llvm.initialize_native_asmparser()  # numba does without: its own code has no inline assembly

_REQUEST_PERMISSION, _TILE_DATA = 0x1023, 18
_ARCH_PRCTL = 158


@cache
def has_amx() -> bool:
    """True if this machine multiplies tiles of bfloat16 and Linux grants it to this process, once asked."""
    features = llvm.get_host_cpu_features()
    is_there = all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512f"))
    is_compiled_for_it = not config.CPU_NAME and not config.CPU_FEATURES  # else for what the user named
    if platform.system() != "Linux" or not (is_there and is_compiled_for_it):
        return False
    request: Any = ctypes.CDLL(None).syscall
    return bool(request(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0)


@intrinsic
def begin_tiles(context: Any) -> Any:
    """Sets the tile registers up, in this thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.ArrayType(_BYTE, _BYTES)
        with builder.goto_entry_block():
            room = builder.alloca(kind)
        builder.store(ir.Constant(kind, _CONFIGURATION), room)
        _assembly(builder, "ldtilecfg ($0)", builder.ptrtoint(room, _LONG))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def end_tiles(context: Any) -> Any:
    """Frees the tile registers, whose content the system would else keep for this thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _assembly(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def amx_tile(
    context: Any, groups: Any, w: Any, other: Any, w_stride: Any, x: Any, x_stride: Any, steps: Any, y: Any,
    y_other: Any, y_stride: Any, far: Any,
) -> Any:  # fmt: skip
    """``amx_tile(groups, w, other, w_stride, x, x_stride, steps, y, y_other, y_stride, far)``, sums in tiles.

    It adds to y the products of two tiles of rows, at w and at `other`, with one or two groups of `TILE_ROWS`
    tokens, over `steps` times `TILE_COLUMNS` elements. x is (elements / 2, tokens, 2), bfloat16: of each
    token two elements lie beside each other. y and `y_other` are float32, a row for each weight row.

    All strides are in bytes; `far` is the distance from w to the rows that are read later.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        groups, *others = arguments
        for count in each_count(builder, groups, 2):
            _tile(builder, count, *others)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 11), generate


def _tile(
    builder: Any, groups: int, w: Any, other: Any, w_stride: Any, x: Any, x_stride: Any, steps: Any, y: Any,
    y_other: Any, y_stride: Any, far: Any,
) -> None:  # fmt: skip
    sums = [
        (builder.add(line, long(_BYTES * group)), f"%tmm{2 * group + row}")
        for row, line in enumerate((y, y_other))
        for group in range(groups)
    ]
    for address, register in sums:
        _assembly(builder, f"tileloadd ($0,$1,1), {register}", address, y_stride)
    entry = builder.block
    loop, done = builder.append_basic_block("amx.loop"), builder.append_basic_block("amx.done")
    builder.branch(loop)

    builder.position_at_end(loop)
    step = builder.phi(_LONG)
    step.add_incoming(long(0), entry)
    lines = [offset_by(builder, begin, step, _BYTES) for begin in (w, other)]
    for line in lines:
        for row in range(TILE_ROWS):
            prefetch_far(builder, builder.add(offset_by(builder, line, w_stride, row), far))
    given = offset_by(builder, x, builder.mul(step, x_stride), TILE_ROWS)
    for row, line in enumerate(lines):
        _assembly(builder, f"tileloadd ($0,$1,1), %tmm{4 + row}", line, w_stride)
    for group in range(groups):
        address = builder.add(given, long(_BYTES * group))
        _assembly(builder, f"tileloadd ($0,$1,1), %tmm{6 + group}", address, x_stride)
        for row in range(2):
            _assembly(builder, f"tdpbf16ps %tmm{6 + group}, %tmm{4 + row}, %tmm{2 * group + row}")
    after = builder.add(step, long(1))
    step.add_incoming(after, loop)
    builder.cbranch(builder.icmp_signed("<", after, steps), loop, done)

    builder.position_at_end(done)
    for address, register in sums:
        _assembly(builder, f"tilestored {register}, ($0,$1,1)", address, y_stride)


def _assembly(builder: Any, text: str, *operands: Any) -> None:
    """Instructions on addresses and strides; the order among them, and to memory, is kept."""
    kind = ir.FunctionType(ir.VoidType(), [_LONG] * len(operands))
    builder.asm(kind, text, ",".join([*["r"] * len(operands), "~{memory}"]), list(operands), True)
