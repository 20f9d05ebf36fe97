"""Summaries of long rows on one core: threads would cost more than they save on a busy machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft.engine._kernels.maxima import BLOCK, block_maxima, has_nan
from retrieval_draft.engine._kernels.softmax import exp_sum_above

__all__ = ["BLOCK", "read_rows"]


@kernel
def read_rows(
    logits: NDArray[np.float32],
    bits: NDArray[np.int32],
    maxima: NDArray[np.float32],
    order: NDArray[np.int32],
    next_tokens: NDArray[np.int32],
    finite: NDArray[np.bool_],
    indices: NDArray[np.int32],
    probs: NDArray[np.float32],
) -> None:
    """The first index of each row's largest value, and the probabilities of the k largest under its softmax.

    Row by row, so that the second pass over a row finds it in the cache.

    Args:
        logits: float32, shape (n, vocabulary).
        bits: int32, the memory of `logits`.
        maxima: float32, shape (blocks,). Scratch.
        order: int32, the memory of `maxima`.
        next_tokens: int32, shape (n,). Written: the lowest index of the maximum.
        finite: bool, shape (n,). Written: False where a value is NaN.
        indices: int32, shape (n, k). Written, best first.
        probs: float32, shape (n, k). Written.
    """
    for row in range(logits.shape[0]):
        values = probs[row]
        next_tokens[row], best = _top_k(logits[row], bits[row], maxima, order, indices[row], values)
        finite[row] = not np.isnan(best)
        if len(values):
            total = exp_sum_above(logits[row], best)
            for slot in range(len(values)):
                values[slot] = np.exp(values[slot] - best) / total


@kernel
def _top_k(
    line: NDArray[np.float32],
    bits: NDArray[np.int32],
    maxima: NDArray[np.float32],
    order: NDArray[np.int32],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
) -> tuple[int, np.float32]:
    """The lowest index of a row's maximum, and the maximum, NaN if any value is; writes the k largest.

    Floats are compared as integers of the same order, which vectorises without fast-math. Only
    blocks whose maximum exceeds the k-th value so far are scanned again.
    """
    size, k = line.shape[0], values.shape[0]
    largest, smallest = block_maxima(bits, order)
    top, first = maxima[0], 0
    for block in range(1, maxima.shape[0]):
        if maxima[block] > top:
            top, first = maxima[block], block
    best = first * BLOCK
    while best < min(first * BLOCK + BLOCK, size) - 1 and line[best] != top:
        best += 1
    if has_nan(largest, smallest):
        top = np.float32(np.nan)
    if k == 0:
        return best, top
    values[:] = -np.inf
    indices[:] = -1
    # The best block first, so that the k-th value is high early and few others are opened.
    for turn in range(-1, maxima.shape[0]):
        block = first if turn < 0 else turn
        full = indices[k - 1] >= 0
        if turn == first or (full and not maxima[block] > values[k - 1]):
            continue
        for column in range(block * BLOCK, min(block * BLOCK + BLOCK, size)):
            value = line[column]
            if indices[k - 1] >= 0 and not value > values[k - 1]:
                continue
            slot = k - 1
            while slot > 0 and (indices[slot - 1] < 0 or value > values[slot - 1]):
                values[slot] = values[slot - 1]
                indices[slot] = indices[slot - 1]
                slot -= 1
            values[slot] = value
            indices[slot] = column
    return best, top
