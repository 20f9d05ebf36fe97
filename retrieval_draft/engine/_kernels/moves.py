"""Nodes of an accepted path moved to the end of the text, in all layers of a cache at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft._kernels.views import int32_rows

__all__ = ["move_slots"]

ADDRESS, BLOCKS, CAPACITY, WORDS, START = range(5)
"""Columns of a buffer: its address; its blocks, slots in each, words of four bytes in each slot; the slot of
node 0."""


@kernel
def move_slots(buffers: NDArray[np.int64], moved: NDArray[np.int64], kept: int) -> None:
    """Copies the slot of node ``moved[i]`` to that of node ``kept + i``, in every block of every buffer.

    Args:
        buffers: int64, shape (m, 5). Memory that the caller keeps.
        moved: int64, shape (n,). Nodes, ascending, so that none is overwritten before it is read.
        kept: At most moved[0].
    """
    for index in range(len(buffers)):
        blocks, capacity, start = buffers[index, BLOCKS], buffers[index, CAPACITY], buffers[index, START]
        slots = int32_rows(buffers[index, ADDRESS], blocks * capacity, buffers[index, WORDS])
        for block in range(blocks):
            first = block * capacity + start
            for item in range(len(moved)):
                slots[first + kept + item] = slots[first + moved[item]]
