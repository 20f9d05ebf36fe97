"""The tokens that the model predicts most often, as guesses where no context is known."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index.source import TokenArray

__all__ = ["FrequentTokens"]

KEPT = 64
FADE = 20000.0
"""Counts are halved when they sum to this: after some dozens of replies a count is halved. On the traces
5,000 and 100,000, and 128 tokens kept, change the result by less than 0.3%."""

MAX_IDS = 1 << 24
"""Smallest id that is not counted, as no vocabulary has it: arrays have an entry for each id up to the
largest."""


class FrequentTokens:
    """Counts of all tokens, and the tokens with the largest.

    Not thread-safe: the adjacency matrix, which owns it, holds a lock.

    Example:
        add [[5, 7]] with probs [[.6, .3]], then [[5, 9]] with [[.8, .1]]: 5 has 1.4 of 1.8, 7 .3, 9 .1
    """

    def __init__(self) -> None:
        from retrieval_draft.index._kernels import frequent

        self._kernels: Any = frequent
        self.counts: NDArray[np.float32] = np.zeros(0, np.float32)
        self._slots: NDArray[np.int32] = np.empty(0, np.int32)
        self.tokens: NDArray[np.int32] = np.full(KEPT, -1, np.int32)
        self.total: NDArray[np.float64] = np.zeros(1, np.float64)

    @property
    def nbytes(self) -> int:
        """Bytes held: 8 for each id up to the largest seen."""
        return self.counts.nbytes + self._slots.nbytes + self.tokens.nbytes + self.total.nbytes

    def add(self, tokens: TokenArray, probs: NDArray[np.float32]) -> None:
        """Counts predictions.

        Args:
            tokens: int32, shape (m, k). -1 where a row has fewer.
            probs: float32, shape (m, k).
        """
        while True:
            needed = self._kernels.count(
                self.counts, self._slots, self.tokens, self.total, tokens, probs, MAX_IDS, FADE
            )
            if needed <= len(self.counts):
                return
            room = max(needed, 2 * len(self.counts), 1024)
            counts, slots = np.zeros(room, np.float32), np.full(room, -1, np.int32)
            counts[: len(self.counts)] = self.counts
            slots[: len(self._slots)] = self._slots
            self.counts, self._slots = counts, slots
