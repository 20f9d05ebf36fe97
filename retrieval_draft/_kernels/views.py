"""Arrays of any length at addresses, so that one kernel reads separate arrays of each request.

The caller keeps the arrays alive and in place for as long as the kernel runs.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, config, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

__all__ = ["float32_row", "int32_row", "int32_rows", "int64_row", "prefetch"]


def _pointer(pointee: Any, kind: Any) -> Any:
    def point(typing_context: Any, address: Any) -> Any:
        del typing_context, address

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            del context, signature
            return builder.inttoptr(arguments[0], pointee.as_pointer())

        pointer: Any = types.CPointer
        return pointer(kind)(types.int64), generate

    return intrinsic(point)


def _fetch(typing_context: Any, address: Any) -> Any:
    del typing_context, address

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        insert: Any = cgutils.get_or_insert_function
        function = insert(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte, number, number, number]),
            "llvm.prefetch.p0",
        )
        read, keep, data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], byte), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


_prefetch: Any = intrinsic(_fetch)
prefetch: Any
int32_row: Any
int32_rows: Any
int64_row: Any
float32_row: Any
if getattr(config, "DISABLE_JIT", 0):  # the same in plain Python, for tests

    def _array(kind: type[Any], address: int, size: int) -> NDArray[Any]:
        return np.ctypeslib.as_array((kind * int(size)).from_address(int(address)))

    def prefetch(address: int) -> None:
        """Does nothing: Python has no prefetch."""

    def int32_row(address: int, size: int) -> NDArray[np.int32]:
        """int32, shape (size,)."""
        return _array(ctypes.c_int32, address, size)

    def int32_rows(address: int, rows: int, columns: int) -> NDArray[np.int32]:
        """int32, shape (rows, columns)."""
        return _array(ctypes.c_int32, address, rows * columns).reshape(rows, columns)

    def int64_row(address: int, size: int) -> NDArray[np.int64]:
        """int64, shape (size,)."""
        return _array(ctypes.c_int64, address, size)

    def float32_row(address: int, size: int) -> NDArray[np.float32]:
        """float32, shape (size,)."""
        return _array(ctypes.c_float, address, size)

else:
    _int32_at = _pointer(ir.IntType(32), types.int32)
    _int64_at = _pointer(ir.IntType(64), types.int64)
    _float32_at = _pointer(ir.FloatType(), types.float32)

    @kernel
    def prefetch(address: int) -> None:
        """Prefetches the memory at an address, which need not be valid."""
        _prefetch(address)

    @kernel
    def int32_row(address: int, size: int) -> NDArray[np.int32]:
        """int32, shape (size,)."""
        return carray(_int32_at(address), (size,))

    @kernel
    def int32_rows(address: int, rows: int, columns: int) -> NDArray[np.int32]:
        """int32, shape (rows, columns)."""
        return carray(_int32_at(address), (rows, columns))

    @kernel
    def int64_row(address: int, size: int) -> NDArray[np.int64]:
        """int64, shape (size,)."""
        return carray(_int64_at(address), (size,))

    @kernel
    def float32_row(address: int, size: int) -> NDArray[np.float32]:
        """float32, shape (size,)."""
        return carray(_float32_at(address), (size,))
