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
_PART = 1 << 11
"""Slots that are read before it is known whether more rows may go."""

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
        parts: list[MatrixRows] = []
        room, count = self._credit - ENTRY_BYTES, MOST_ROWS
        begin = self._turn
        unread = ROWS
        while unread:
            end = min(begin + min(_PART, unread), ROWS)
            unread -= end - begin
            rows = self._pending.rows(LEAST_VISITS, begin, end)
            rows = rows.only(np.flatnonzero(rows.probs[:, 0] >= LEAST_PROB))
            sizes = np.cumsum(packed_sizes(rows, self._vocabulary))
            fitting = min(int(np.searchsorted(sizes, room, side="right")), count)
            if fitting:
                parts.append(rows.only(np.arange(fitting)))
                room, count = room - float(sizes[fitting - 1]), count - fitting
            if fitting < len(rows):
                begin = begin if not fitting else self._pending.slot(rows.keys[fitting - 1]) + 1
                break
            begin = end % ROWS
        self._turn = begin % ROWS
        if not parts:
            return None
        self._credit = room
        taken = MatrixRows.join(parts)
        self._pending.empty(taken)
        return taken
