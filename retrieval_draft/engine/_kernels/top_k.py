"""Top-k of long rows on one core: threads would cost more than they save on a busy machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.engine._kernels.maxima import BLOCK, block_maxima, has_nan

__all__ = ["BLOCK", "top_k_rows"]


@kernel
def top_k_rows(
    logits: NDArray[np.float32],
    bits: NDArray[np.int32],
    maxima: NDArray[np.float32],
    order: NDArray[np.int32],
    best: NDArray[np.float32],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
    out: NDArray[np.int32],
) -> None:
    """The largest values of each row, and the first index of the largest.

    Floats are compared as integers of the same order, which vectorises without fast-math. Only
    blocks whose maximum exceeds the k-th value so far are scanned again.

    Args:
        logits: float32, shape (n, vocabulary).
        bits: int32, the memory of `logits`.
        maxima: float32, shape (blocks,). Scratch.
        order: int32, the memory of `maxima`.
        best: float32, shape (n,). Written: the maximum, NaN if any value is.
        indices: int32, shape (n, k). Written, best first.
        values: float32, shape (n, k). Written.
        out: int32, shape (n,). Written: the lowest index of the maximum.
    """
    size, k = logits.shape[1], values.shape[1]
    for row in range(logits.shape[0]):
        line = logits[row]
        largest, smallest = block_maxima(bits[row], order)
        top, first = maxima[0], 0
        for block in range(1, maxima.shape[0]):
            if maxima[block] > top:
                top, first = maxima[block], block
        column = first * BLOCK
        while column < min(first * BLOCK + BLOCK, size) - 1 and line[column] != top:
            column += 1
        out[row] = column
        best[row] = np.float32(np.nan) if has_nan(largest, smallest) else top
        if k == 0:
            continue
        values[row] = -np.inf
        indices[row] = -1
        # The best block first, so that the k-th value is high early and few others are opened.
        for turn in range(-1, maxima.shape[0]):
            block = first if turn < 0 else turn
            full = indices[row, k - 1] >= 0
            if turn == first or (full and not maxima[block] > values[row, k - 1]):
                continue
            for column in range(block * BLOCK, min(block * BLOCK + BLOCK, size)):
                value = line[column]
                if indices[row, k - 1] >= 0 and not value > values[row, k - 1]:
                    continue
                slot = k - 1
                while slot > 0 and (indices[row, slot - 1] < 0 or value > values[row, slot - 1]):
                    values[row, slot] = values[row, slot - 1]
                    indices[row, slot] = indices[row, slot - 1]
                    slot -= 1
                values[row, slot] = value
                indices[row, slot] = column
