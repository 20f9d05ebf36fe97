"""Token runs with the repetition of text: phrases of skewed frequency, with random errors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index.segments.segment import text_dtype

__all__ = ["SyntheticText"]

_BOOK = 1 << 18
_BLOCK = 1 << 20


class SyntheticText:
    """A source of text over one phrase book.

    Args:
        vocabulary: Number of token ids.
        seed: Of the phrase book; the same seed gives the same phrases.
    """

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        lengths = random.integers(2, 17, _BOOK)
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths
        self._vocabulary = vocabulary
        self._words = self._zipf(random, int(self._ends[-1]), vocabulary).astype(np.int32)

    def tokens(self, count: int, seed: int) -> NDArray[np.int32]:
        """Generates text: int32, shape (count,).

        Args:
            count: Tokens.
            seed: The same seed gives the same text.
        """
        random = np.random.default_rng((seed, 1))
        out = np.empty(count, np.int32)
        filled = 0
        while filled < count:
            phrases = self._zipf(random, _BLOCK // 8, _BOOK)
            starts, lengths = self._starts[phrases], (self._ends - self._starts)[phrases]
            begins = np.cumsum(lengths) - lengths
            inside = np.arange(int(lengths.sum())) - np.repeat(begins, lengths)
            piece = self._words[np.repeat(starts, lengths) + inside]
            slips = random.random(len(piece)) < 0.03
            piece[slips] = self._zipf(random, int(slips.sum()), self._vocabulary)
            taken = min(len(piece), count - filled)
            out[filled : filled + taken] = piece[:taken]
            filled += taken
        return out

    def joined(self, count: int, seed: int, document: int = 700) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Documents in one array as `Segment.join` takes them, and their start indices."""
        text = self.tokens(count, seed).astype(text_dtype(self._vocabulary))
        text[document::document] = self._vocabulary
        text[-1] = self._vocabulary
        starts = np.arange(0, count, document, dtype=np.int32) + 1
        starts[0] = 0
        return text, starts[starts < count - 1] if count > 1 else starts

    @staticmethod
    def _zipf(random: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
        """Numbers below `size`, number k about as often as 1 / (k + 10)."""
        uniform = random.random(count)
        return np.minimum(10 * (((size + 10) / 10) ** uniform - 1), size - 1).astype(np.int64)
