"""One request's lookups in suffix-sorted segments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index._workspace import Workspace
from retrieval_draft.index.segments.segment import Segment, match_state
from retrieval_draft.index.source import BaseSession, Proposal, TokenArray

__all__ = ["SegmentSession", "Segments"]

ESCAPE = 5.0
ORDER_CAP = 4
GAIN = 1.0
"""Larger than in the automaton: other texts predict less well than the request's own, so shorter contexts get
more. Beyond ORDER_CAP a context counts for GAIN lengths more with each doubling, so that a long match drafts
deep. On replayed code and chat escapes of 2 to 8, caps of 4 to 10 and gains of 0 to 2 differ by less than
3%."""

Segments = tuple[Segment, ...]
"""Segments, oldest first. A new tuple with every change, so that readers need no lock."""


class SegmentSession(BaseSession):
    """Tracks the occurrences of a growing text's end in each segment.

    Args:
        segments: Returns the present segments; called at every step.
        prompt: int32, shape (length,).
        source: The source's name, for proposals.
        level: Its locality.

    Example:
        one segment with the text 7 8 9 4, prompt 5 7 8: propose(2)  ->  tokens [9, 4], parents [-1, 0]
    """

    def __init__(self, segments: Callable[[], Segments], prompt: TokenArray, source: str, level: str) -> None:
        from retrieval_draft.index._kernels import segment_match, segment_tree

        self._match = segment_match
        self._tree = segment_tree
        self._supply = segments
        self._source = source
        self._level = level
        self._segments: Segments = ()
        self._rows: NDArray[np.int64] = np.empty((0, segment_match.SEGMENT_FIELDS), np.int64)
        self._chain, self._longest, self._tail = match_state(0)
        self._params = np.array([ESCAPE, ORDER_CAP, GAIN], np.float64)
        self._workspace = Workspace(fields=4, children=segment_tree.CHILDREN)
        self._ranges: NDArray[np.int16] = np.empty((0, segment_tree.RANGES, 2), np.int16)
        end = np.asarray(prompt, np.int32)[-segment_match.LONGEST :]
        self._tail[segment_match.LONGEST - len(end) :] = end
        self._refresh()

    @property
    def match_length(self) -> int:
        """Tokens of the text's end that occur in a segment: 0, or a sort key's length to 32."""
        return int(self._longest.max(initial=0))

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        self._refresh()
        self._match.advance(self._rows, self._chain, self._longest, self._tail, np.array(tokens, np.int32))

    def propose(self, budget: int) -> Proposal:
        """The tokens after the text's end in the segments, as a tree of the `budget` most probable nodes."""
        self._refresh()
        found = self._workspace.fit(budget)
        if len(self._ranges) != len(self._workspace.heap) + 1:
            self._ranges = np.empty((len(self._workspace.heap) + 1, self._tree.RANGES, 2), np.int16)
        size = self._tree.propose(
            self._rows,
            self._chain,
            self._longest,
            self._tail,
            self._params,
            budget,
            self._ranges,
            *self._workspace.scratch,
            *found,
        )
        return found.proposal(size, self._source, self._level)

    def close(self) -> None:
        """Releases the segments."""
        self._supply = tuple
        self._refresh()

    def _refresh(self) -> None:
        """Adds new segments, and drops those that are gone."""
        segments = self._supply()
        if segments is self._segments:
            return
        chain, longest, _ = match_state(len(segments))
        known = {id(segment): index for index, segment in enumerate(self._segments)}
        rows = np.empty((len(segments), self._match.SEGMENT_FIELDS), np.int64)
        for index, segment in enumerate(segments):
            rows[index] = segment.row
            old = known.get(id(segment))
            if old is not None:
                chain[index], longest[index] = self._chain[old], self._longest[old]
            else:
                self._match.locate(rows, index, chain, longest, self._tail)
        self._segments, self._rows, self._chain, self._longest = segments, rows, chain, longest


def segments_nbytes(segments: Sequence[Segment]) -> int:
    """Bytes of all arrays."""
    return sum(segment.nbytes for segment in segments)
