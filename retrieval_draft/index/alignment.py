"""Continuations of a text that is copied with edits: places where the copy goes on after one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray

__all__ = ["AlignmentSession", "AlignmentSource", "make_source"]

CHANCES = np.array(
    [0.15, 0.4, 0.6, 0.75, 0.8, 0.82, 0.85, 0.88, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.975, 0.98, 0.985, 0.99],
    np.float32,
)
"""Share of right continuations by the number of tokens that are the same before it."""


class AlignmentSession:
    def __init__(self, prompt: TokenArray, references: Sequence[TokenArray]) -> None:
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
            self.observe(np.array([-1], np.int32))
        self.observe(prompt)

    def propose(self, budget: int) -> Proposal:
        tokens = np.empty(budget, np.int32)
        parents = np.empty(budget, np.int32)
        probs = np.empty(budget, np.float32)
        lengths = np.empty(budget, np.int32)
        size = self._kernels.propose(
            self._text, self._length, self._meta, CHANCES, budget, tokens, parents, probs, lengths
        )
        return Proposal(tokens[:size], parents[:size], probs[:size], lengths[:size], "alignment", "request")

    def observe(self, tokens: TokenArray) -> None:
        array = np.array(tokens, np.int32, ndmin=1)
        needed = self._length + len(array)
        if needed > len(self._text):
            text = np.empty(needed + needed // 8 + 256, np.int32)
            text[: self._length] = self._text[: self._length]
            self._text = text
        self._kernels.append(self._text, self._length, array, self._table, self._meta)
        self._length = needed

    def learn(self, logits: NodeLogits) -> None:
        """Does nothing: only text is kept here."""

    def close(self) -> None:
        """Does nothing."""


class AlignmentSource:
    name = "alignment"
    level = "request"

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> AlignmentSession:
        return AlignmentSession(prompt, references)

    def flush(self) -> None:
        """Does nothing: no state outlives a request."""

    def close(self) -> None:
        """Does nothing: there is no thread or file to close."""

    @property
    def nbytes(self) -> int:
        """0: sessions hold everything."""
        return 0


def make_source(config: DraftConfig, stores: DraftStores) -> AlignmentSource:
    """A source over the request's own text."""
    return AlignmentSource()
