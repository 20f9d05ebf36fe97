"""Reads at an address, so that one kernel can read any number of arrays of different widths.

The caller keeps the arrays alive and in place for as long as the kernel runs, and indices within them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.extending import intrinsic

from retrieval_draft._kernels.jit import kernel

__all__ = ["load_int32", "load_token", "load_uint64"]


def _loader(bits: int, result: Any, signed: bool) -> Any:
    def load(typing_context: Any, address: Any, index: Any) -> Any:
        del typing_context, address, index

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            del context, signature
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            value = builder.load(builder.gep(pointer, [arguments[1]]))
            if bits == 64:
                return value
            extend = builder.sext if signed else builder.zext
            return extend(value, ir.IntType(64))

        return result(types.int64, types.int64), generate

    return intrinsic(load)


def _reader(kind: type[Any], result: type[Any]) -> Any:
    """The same in Python, for tests with NUMBA_DISABLE_JIT."""
    size = ctypes.sizeof(kind)

    def load(address: int, index: int) -> Any:
        return result(kind.from_address(int(address) + size * int(index)).value)

    return load


_load_uint16: Any
_load_uint32: Any
load_int32: Any
load_uint64: Any
if getattr(config, "DISABLE_JIT", 0):  # numba sets it when it is imported
    _load_uint16 = _reader(ctypes.c_uint16, int)
    _load_uint32 = _reader(ctypes.c_uint32, int)
    load_int32 = _reader(ctypes.c_int32, int)
    load_uint64 = _reader(ctypes.c_uint64, np.uint64)
else:
    _load_uint16 = _loader(16, types.int64, signed=False)
    _load_uint32 = _loader(32, types.int64, signed=False)
    load_int32 = _loader(32, types.int64, signed=True)
    load_uint64 = _loader(64, types.uint64, signed=False)


@kernel
def load_token(address: int, width: int, index: int) -> int:
    """Token number `index` of an array of tokens of `width` bytes, 2 or 4."""
    if width == 2:
        return _load_uint16(address, index)
    return _load_uint32(address, index)
