"""The segments that a batch's sessions are looked up in, and the lookup state of each session's text end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.drafting.batch.slots import Slots
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.segments.segment_session import Segments

__all__ = ["SegmentTable"]


class SegmentTable:
    """Segments of several sources, source by source, and the lookups of all slots.

    Invariant: `rows` holds addresses of arrays of `segments`, which are kept until the table changes; it
    changes only between kernels.

    Args:
        supplies: For each source, a function that returns its segments: a new tuple whenever they have
            changed.

    Attributes:
        rows: int64, shape (segments, SEGMENT_FIELDS).
        starts: int64, shape (sources + 1,). Index of each source's first segment.
        chain: int32, shape (slots, segments, LONGEST + 1, 2). See `segment_match`.
        longest: int32, shape (slots, segments).
    """

    def __init__(self, supplies: Sequence[Callable[[], Segments]]) -> None:
        from retrieval_draft.index._kernels import segment_match

        self._kernels: Any = segment_match
        self._supplies = tuple(supplies)
        self._known: tuple[Segments, ...] = tuple(() for _ in supplies)
        self._segments: tuple[Segment, ...] = ()
        self.rows: NDArray[np.int64] = np.empty((0, segment_match.SEGMENT_FIELDS), np.int64)
        self.starts: NDArray[np.int64] = np.zeros(len(self._supplies) + 1, np.int64)
        self.chain, self.longest = self._state(0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the lookups; segments belong to their sources."""
        return self.chain.nbytes + self.longest.nbytes

    def fit(self, capacity: int) -> None:
        """Makes room for so many slots."""
        before = len(self.chain)
        if capacity > before:
            chain, longest = self._state(capacity, len(self._segments))
            chain[:before], longest[:before] = self.chain, self.longest
            self.chain, self.longest = chain, longest

    def refresh(self, slots: Slots) -> bool:
        """Adds new segments and drops those that are gone.

        Args:
            slots: Their texts, as far as they were looked up before, are looked up in the new segments.

        Returns:
            True if anything changed.
        """
        found = tuple([supply() for supply in self._supplies])
        if all([new is old for new, old in zip(found, self._known, strict=True)]):
            return False
        segments = tuple(segment for each in found for segment in each)
        before = {id(segment): index for index, segment in enumerate(self._segments)}
        moved = np.array([before.get(id(segment), -1) for segment in segments], np.int64)
        rows = np.empty((len(segments), self._kernels.SEGMENT_FIELDS), np.int64)
        for index, segment in enumerate(segments):
            rows[index] = segment.row
        chain, longest = self._state(len(self.chain), len(segments))
        if len(slots):
            from retrieval_draft.drafting.batch._kernels.propose import relocate

            relocate(slots.used, rows, moved, self.chain, self.longest, chain, longest, slots.tail)
        self._known, self._segments, self.rows = found, segments, rows
        self.chain, self.longest = chain, longest
        self.starts = np.cumsum([0, *(len(each) for each in found)], dtype=np.int64)
        return True

    def locate(self, slot: int, tail: NDArray[np.int32]) -> None:
        """Finds a new session's text in every segment.

        Args:
            slot: The session's.
            tail: int32, shape (LONGEST,). Its text's end.
        """
        for segment in range(len(self._segments)):
            self._kernels.locate(self.rows, segment, self.chain[slot], self.longest[slot], tail)

    def _state(self, slots: int, segments: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        longest = self._kernels.LONGEST
        return np.zeros((slots, segments, longest + 1, 2), np.int32), np.zeros((slots, segments), np.int32)
