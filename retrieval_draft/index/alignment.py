"""Continuations of a text that is copied with edits: the positions where the copy may continue after one.

A suffix automaton knows what followed the last tokens. After an edit these tokens are new, and it has short
contexts only, which occur in many positions; the copy most often continues near the one where it was left. So
diffs are aligned, and match models of compressors recover (lpaq, Mahoney 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import BaseSession, BaseSource, Proposal, TokenArray, empty_proposal

__all__ = ["AlignmentSession", "AlignmentSource", "make_source"]

CHANCES: NDArray[np.float32] = np.array(
    [
        0.15, 0.4, 0.6, 0.75, 0.8, 0.82, 0.85, 0.88, 0.9,
        0.92, 0.94, 0.95, 0.96, 0.97, 0.975, 0.98, 0.985, 0.99,
    ],
    np.float32,
)  # fmt: skip
"""Share of right continuations by the number of equal tokens before them, on edits of Python files."""

_END: TokenArray = np.array([-1], np.int32)


class AlignmentSession(BaseSession):
    """One request's text, and where in it the copy stands.

    Args:
        prompt: int32, shape (length,).
        references: int32, shape (length,) each.

    Example:
        text "1 2 3 4 5 6 7 8, 1 2 3 4 9": the copy was left at 5, for 9; it may continue with 6, as if 9 had
        replaced 5
    """

    def __init__(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> None:
        from retrieval_draft.index._kernels import alignment

        self._kernels: Any = alignment
        room = len(prompt) + sum(len(text) + 1 for text in references) + 256
        self._text: NDArray[np.int32] = np.empty(room, np.int32)
        self._length = 0
        self._table: NDArray[np.int32] = np.zeros(1 << (2 * room).bit_length(), np.int32)
        self._meta: NDArray[np.int64] = np.zeros(alignment.META_FIELDS, np.int64)
        self._meta[alignment.POINTER] = -1
        for text in references:
            self.observe(text)
            self.observe(_END)
        self.observe(prompt)

    def propose(self, budget: int) -> Proposal:
        """Chains from the positions where the copy may continue."""
        if self._meta[self._kernels.POINTER] < 0 or budget <= 0:
            return empty_proposal(AlignmentSource.name, AlignmentSource.level)
        tokens, parents, lengths = np.empty((3, budget), np.int32)
        probs = np.empty(budget, np.float32)
        size = self._kernels.propose(
            self._text, self._length, self._meta, CHANCES, budget, tokens, parents, probs, lengths
        )
        return Proposal(
            tokens[:size],
            parents[:size],
            probs[:size],
            lengths[:size],
            AlignmentSource.name,
            AlignmentSource.level,
        )

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        array = np.array(tokens, np.int32, ndmin=1)  # a copy: the kernel is compiled for writable arrays only
        length = self._length + len(array)
        if length > len(self._text):
            text = np.empty(length + length // 8 + 256, np.int32)
            text[: self._length] = self._text[: self._length]
            self._text = text
        self._kernels.append(self._text, self._length, array, self._table, self._meta)
        self._length = length


class AlignmentSource(BaseSource):
    """Drafts what follows the text that the request's own text copies, across edits."""

    name = "alignment"

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> AlignmentSession:
        """Indexes the prompt, int32, shape (length,), and the references, int32 each."""
        return AlignmentSession(prompt, references)


def make_source(config: DraftConfig, stores: DraftStores) -> AlignmentSource:
    """A source over the request's own text."""
    return AlignmentSource()
