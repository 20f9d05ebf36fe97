"""The largest value of each block of a long row, and whether the row holds NaN, in one pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

__all__ = ["BLOCK", "INFINITY", "block_maxima", "has_nan"]

BLOCK = 256

INFINITY = np.int32(0x7F800000)
MINUS_INFINITY = np.int32(-0x7F800001)
HIGHEST = np.int32(0x7FFFFFFF)
LOWEST = np.int32(-2147483648)


@kernel
def _range(bits: NDArray[np.int32]) -> tuple[int, int]:
    """The largest and the smallest of some floats, as integers of the same order."""
    high, low = LOWEST, HIGHEST
    for column in range(bits.shape[0]):
        # The casts keep numba from widening to int64, which takes nine times as long.
        key = np.int32(bits[column])
        key = np.int32(key ^ ((key >> np.int32(31)) & HIGHEST))
        high = key if key > high else high
        low = key if key < low else low
    return high, low


@kernel
def block_maxima(bits: NDArray[np.int32], order: NDArray[np.int32]) -> tuple[int, int]:
    """The largest value of each block of 256; floats are compared as integers, which vectorises.

    Args:
        bits: int32, shape (vocabulary,). The memory of a float32 row.
        order: int32, shape (blocks,). The memory of the float32 maxima. Written.

    Returns:
        The largest and the smallest of all, as integers of the same order.
    """
    largest, smallest = LOWEST, HIGHEST
    for block in range(order.shape[0]):
        high, low = _range(bits[block * BLOCK : min(block * BLOCK + BLOCK, bits.shape[0])])
        largest = high if high > largest else largest
        smallest = low if low < smallest else smallest
        order[block] = np.int32(high ^ ((high >> np.int32(31)) & HIGHEST))
    return largest, smallest


@kernel
def has_nan(largest: int, smallest: int) -> bool:
    """True if a row with these extremes, of `block_maxima`, holds NaN of either sign."""
    return largest > INFINITY or smallest < MINUS_INFINITY
