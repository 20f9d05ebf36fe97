"""Rows that wait to be sent: what this server has learned since its last entry."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from retrieval_draft.index.adjacency import AdjacencyMatrix
from retrieval_draft.index.matrix_rows import LEAST_PROB, MatrixRows, packed_sizes
from retrieval_draft.index.source import NodeLogits
from retrieval_draft.index.store.learned_entry import MOST_ROWS, TOP

__all__ = ["RowOutbox"]

ROWS = 1 << 15
"""Rows that can wait; the ones written longest ago go."""

LEAST_VISITS = 2
"""Observations from which on a row is sent: of what was seen once, the text tells the most."""

ENTRY_BYTES = 128
"""Bytes of an entry besides its rows, with a signature."""

_MOST_CREDIT = 1 << 16
_MOST_SEEN = 255


class RowOutbox:
    """Collects predictions, and returns the rows seen often enough, within a share of the texts' bytes.

    They take turns, so that no row waits for others that are seen more often: most are of long contexts, of
    which readers know little; what follows one common token they know from the texts.

    A row that was returned starts from nothing: each observation is sent once, and readers add them up.

    Args:
        vocabulary: Number of token ids.
        share: Bytes of rows for each byte of tokens.

    Example:
        with a share of 0.5, after 1000 tokens: rows of 2000 bytes at most
    """

    def __init__(self, vocabulary: int, share: float) -> None:
        self._vocabulary = vocabulary
        self._share = share
        self._credit = 0.0
        self._turn = 0
        self._pending: AdjacencyMatrix | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of waiting rows."""
        return 0 if self._pending is None else self._pending.nbytes

    def learn(self, learned: Sequence[NodeLogits]) -> None:
        """Adds predictions of a request whose text is shared."""
        if self._share and learned:
            if self._pending is None:
                self._pending = AdjacencyMatrix(ROWS, TOP, _MOST_SEEN)
            for logits in learned:
                inside = (logits.top_tokens < self._vocabulary).all(1)
                inside &= (logits.contexts < self._vocabulary).all(1)
                self._pending.learn(
                    NodeLogits(logits.contexts[inside], logits.top_tokens[inside], logits.top_probs[inside])
                )

    def take(self, text_bytes: int) -> MatrixRows | None:
        """Removes and returns the rows whose turn it is, as many as may go now.

        Args:
            text_bytes: Bytes of the texts sent since the last call.

        Returns:
            None where no row was seen often enough, or too few bytes are left.
        """
        self._credit = min(self._credit + self._share * text_bytes, _MOST_CREDIT)
        if self._pending is None or self._credit <= ENTRY_BYTES:
            return None
        rows = self._pending.rows(LEAST_VISITS)
        rows = rows.only(np.flatnonzero(rows.probs[:, 0] >= LEAST_PROB))
        turns = ((rows.keys >> np.uint64(17)).astype(np.int64) - self._turn) % ROWS
        order = np.argsort(turns, kind="stable")[:MOST_ROWS]
        rows, turns = rows.only(order), turns[order]
        sizes = np.cumsum(packed_sizes(rows, self._vocabulary)) + ENTRY_BYTES
        rows = rows.only(np.arange(np.searchsorted(sizes, self._credit, side="right")))
        if not len(rows):
            return None
        self._credit -= float(sizes[len(rows) - 1])
        self._turn = (self._turn + int(turns[len(rows) - 1]) + 1) % ROWS
        self._pending.empty(rows)
        return rows
