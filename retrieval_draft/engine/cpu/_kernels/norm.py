"""Root-mean-square norm of rows, in one pass where torch takes six operations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import sum_kernel
from retrieval_draft.engine.cpu._kernels.vector_tile import floats_at, load_bfloat16, store_bfloat16

__all__ = ["rms_norm_bfloat16", "rms_norm_float32", "rms_norm_numpy"]


@sum_kernel
def rms_norm_float32(x: int, y: int, scale: NDArray[np.float32], rows: int, eps: float) -> None:
    """Y = x / sqrt(mean(x²) + eps) · scale for each row.

    Args:
        x, y: Addresses of float32 (rows, length), contiguous; y is written.
        scale: float32, shape (length,).
        rows: Number of rows.
        eps: Added to the mean.
    """
    length = scale.shape[0]
    for row in range(rows):
        given = carray(floats_at(x + row * length * 4), (length,))
        out = carray(floats_at(y + row * length * 4), (length,))
        total = np.float32(0.0)
        for column in range(length):
            total += given[column] * given[column]
        factor = np.float32(1.0) / np.sqrt(total / np.float32(length) + np.float32(eps))
        for column in range(length):
            out[column] = given[column] * factor * scale[column]


@sum_kernel
def rms_norm_bfloat16(
    x: int, y: int, scale: NDArray[np.float32], rows: int, eps: float, wide: NDArray[np.float32], twice: bool
) -> None:
    """RMS norm as in `rms_norm_float32`, from and to bfloat16.

    Args:
        wide: float32, shape (length + 1,), scratch.
        twice: Whether the normalised row is rounded to bfloat16 before it is scaled, as Llama does.
    """
    length = scale.shape[0]
    for row in range(rows):
        begin, out = x + row * length * 2, y + row * length * 2
        total = np.float32(0.0)
        for column in range(length):
            wide[column] = load_bfloat16(begin + column * 2)
        for column in range(length):
            total += wide[column] * wide[column]
        factor = np.float32(1.0) / np.sqrt(total / np.float32(length) + np.float32(eps))
        for column in range(length):
            wide[column] *= factor
        if twice:
            for column in range(length):
                store_bfloat16(out + column * 2, wide[column])
            for column in range(length):
                wide[column] = load_bfloat16(out + column * 2)
        for column in range(length):
            store_bfloat16(out + column * 2, wide[column] * scale[column])


def rms_norm_numpy(x: NDArray[np.float32], scale: NDArray[np.float32], eps: float) -> NDArray[np.float32]:
    """The kernels' twin: float32, shape (rows, length), from `x` of that shape and `scale`, (length,)."""
    given: Any = x.astype(np.float64)
    factor = 1.0 / np.sqrt((given * given).mean(-1, keepdims=True) + eps)
    return (given * factor * scale).astype(np.float32)
