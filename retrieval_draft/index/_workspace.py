"""Scratch arrays of a best-first tree search, kept between steps so that a step allocates only its result."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index.source import Proposal

__all__ = ["FoundNodes", "Workspace"]


class FoundNodes(NamedTuple):
    """Arrays that a search writes its nodes to, as `Proposal` has them."""

    tokens: NDArray[np.int32]
    parents: NDArray[np.int32]
    probs: NDArray[np.float32]
    lengths: NDArray[np.int32]

    def proposal(self, size: int, source: str, level: str) -> Proposal:
        """The proposal of the first `size` nodes."""
        return Proposal(
            self.tokens[:size], self.parents[:size], self.probs[:size], self.lengths[:size], source, level
        )


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

    @property
    def scratch(
        self,
    ) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int64], NDArray[np.int32]]:
        """The arrays in the order of the kernels' arguments."""
        return self.ints, self.floats, self.bits, self.heap

    def fit(self, budget: int) -> FoundNodes:
        """Makes room for a search of `budget` nodes, and arrays for these."""
        size = (budget + 1) * self._children
        if size > len(self.heap):
            self.ints = np.empty((size, self._fields), np.int32)
            self.floats = np.empty((2, size), np.float64)
            self.bits = self.floats.view(np.int64)
            self.heap = np.empty(size, np.int32)
        return FoundNodes(
            np.empty(budget, np.int32),
            np.empty(budget, np.int32),
            np.empty(budget, np.float32),
            np.empty(budget, np.int32),
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.ints.nbytes + self.floats.nbytes + self.heap.nbytes
