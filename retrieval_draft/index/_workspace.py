"""Scratch arrays of a best-first tree search, kept between steps so that a step allocates only its result."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Workspace"]


class Workspace:
    """Candidate arrays for one session.

    Args:
        fields: int32 fields a candidate has.
        children: The most candidates one expanded node can add.
    """

    def __init__(self, fields: int, children: int) -> None:
        self._fields = fields
        self._children = children
        self.ints: NDArray[np.int32] = np.empty((0, fields), np.int32)
        self.floats: NDArray[np.float64] = np.empty((2, 0), np.float64)
        self.bits: NDArray[np.int64] = self.floats.view(np.int64)
        self.heap: NDArray[np.int32] = np.empty(0, np.int32)

    def fit(self, budget: int) -> None:
        """Makes room for a search of `budget` nodes."""
        size = (budget + 1) * self._children
        if size > len(self.heap):
            self.ints = np.empty((size, self._fields), np.int32)
            self.floats = np.empty((2, size), np.float64)
            self.bits = self.floats.view(np.int64)
            self.heap = np.empty(size, np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.ints.nbytes + self.floats.nbytes + self.heap.nbytes
