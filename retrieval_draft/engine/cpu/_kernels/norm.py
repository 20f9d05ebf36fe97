"""Root-mean-square norm of rows, in one pass where torch takes six operations."""

from __future__ import annotations

import numpy as np
from numba.np.numpy_support import carray

from retrieval_draft._kernels.jit import kernel, sum_kernel
from retrieval_draft.engine.cpu._kernels.vector_tile import (
    floats_at,
    load_bfloat16,
    stack_floats,
    store_bfloat16,
)

__all__ = ["norm_row", "read_row", "rms_norm", "round_bfloat16", "write_row"]


@kernel
def round_bfloat16(value: float) -> float:
    """The nearest bfloat16, as float32."""
    scratch = stack_floats(1)
    store_bfloat16(scratch, value)
    return load_bfloat16(scratch)


@kernel
def read_row(source: int, target: int, length: int, half: bool) -> None:
    """A row of float32, or of bfloat16 if `half`, as float32. Addresses."""
    out = carray(floats_at(target), (length,))
    if half:
        for column in range(length):
            out[column] = load_bfloat16(source + column * 2)
    else:
        given = carray(floats_at(source), (length,))
        for column in range(length):
            out[column] = given[column]


@kernel
def write_row(source: int, target: int, length: int, half: bool) -> None:
    """A row of float32 as float32, or as bfloat16 if `half`. Addresses."""
    given = carray(floats_at(source), (length,))
    if half:
        for column in range(length):
            store_bfloat16(target + column * 2, given[column])
    else:
        out = carray(floats_at(target), (length,))
        for column in range(length):
            out[column] = given[column]


@sum_kernel
def norm_row(x: int, scale: int, length: int, eps: float, twice: bool, half: bool) -> None:
    """Makes x / sqrt(mean(x²) + eps) · scale of a row of float32, in place.

    Args:
        x: Address of the row.
        scale: Address of float32, as long.
        length: Elements of the row.
        eps: Added to the mean.
        twice: Whether the normalised row is rounded to bfloat16 before it is scaled, as Llama does.
        half: Whether the result is rounded to bfloat16.
    """
    row, factors = carray(floats_at(x), (length,)), carray(floats_at(scale), (length,))
    total = np.float32(0.0)
    for column in range(length):
        total += row[column] * row[column]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(length) + np.float32(eps))
    if twice:
        for column in range(length):
            row[column] = round_bfloat16(row[column] * factor) * factors[column]
    else:
        for column in range(length):
            row[column] = row[column] * factor * factors[column]
    if half:
        for column in range(length):
            row[column] = round_bfloat16(row[column])


@kernel
def rms_norm(x: int, y: int, scale: int, rows: int, length: int, eps: float, twice: bool, wide: int) -> None:
    """Norms contiguous rows by `norm_row`.

    Args:
        x, y: Addresses of (rows, length); y is written.
        scale: Address of float32, (length,).
        rows: Number of rows.
        length: Elements of a row.
        eps: Added to the mean.
        twice: As for `norm_row`.
        wide: 0 for rows of float32; for bfloat16 the address of float32 scratch, (length,).
    """
    half = wide != 0
    size = 2 if half else 4
    for row in range(rows):
        at = y + row * length * size
        target = wide if half else at
        read_row(x + row * length * size, target, length, half)
        norm_row(target, scale, length, eps, twice, half)
        if half:
            write_row(wide, at, length, True)
