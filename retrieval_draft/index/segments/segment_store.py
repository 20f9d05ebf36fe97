"""Segments that are merged by size and evicted by age: a log-structured store in memory.

Segments are immutable; readers take the current tuple and need no lock. One thread adds; the same or another
merges concurrently.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from retrieval_draft.index.build.merge import join_segments
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.segments.segment_session import Segments, segments_nbytes

__all__ = ["GRACE", "SMALL", "SegmentStore"]

RATIO = 4
"""A segment is merged with the newer ones unless it is so many times as large as they are together: there are
about log(tokens) / log(4) segments, and a token is sorted about three times as often as that."""

SHARE = 8
"""A segment with 1 / 8 of the allowed bytes is not merged further, so that eviction has small units."""

SMALL = 1 << 16
"""Tokens that are sorted in some 3 ms."""

GRACE = 1.0
"""Seconds that a replaced segment is kept for sessions that still use it."""


class SegmentStore:
    """Segments, the oldest first, of which the newest are small and soon merged.

    Args:
        vocabulary: Number of token ids.
        max_bytes: Limit of all segments together; the oldest are evicted.
        segments: The initial segments, oldest first.

    Attributes:
        max_bytes: May be changed; segments beyond it are evicted by the next `compact`.
        evicted: Tokens evicted to make room.

    Example:
        segments of 100, 20 and 4 tokens, and one of 2 is added: tidy() joins 4 + 2, as 4 < 4 * 2, and with
        them 20 < 4 * 6, and 100 < 4 * 26: one segment of 126. Of 200, 20, 4 and 2: two, of 200 and 26
    """

    def __init__(self, vocabulary: int, max_bytes: int, segments: Segments = ()) -> None:
        self.max_bytes = max_bytes
        self.evicted = 0
        self._vocabulary = vocabulary
        self._segments = segments
        self._claimed: set[int] = set()  # ids of those being merged, by the thread that replaces them
        self._leaving: deque[tuple[float, Sequence[Segment]]] = deque()
        self._lock = threading.Lock()

    @property
    def segments(self) -> Segments:
        """A tuple that never changes."""
        return self._segments

    @property
    def num_tokens(self) -> int:
        """Tokens that can be looked up now."""
        return sum(segment.num_tokens for segment in self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return segments_nbytes(self._segments)

    def add(self, segment: Segment) -> None:
        """Appends a segment; it can be looked up at once."""
        with self._lock:
            self._segments = (*self._segments, segment)

    def compact(self, most_tokens: int | None = None) -> bool:
        """Joins the newest segments, as many as are due, and then evicts.

        Args:
            most_tokens: Limit of the joined tokens, to bound the time; None for all.

        Returns:
            True if anything changed.
        """
        with self._lock:
            chosen = self._due(most_tokens)
            merging = {id(segment) for segment in chosen}
            self._claimed |= merging
        if not chosen:
            return most_tokens is None and self._evict()
        try:
            joined = join_segments(chosen, self._vocabulary)
            with self._lock:
                at = self._segments.index(chosen[0])
                self._segments = (*self._segments[:at], joined, *self._segments[at + len(chosen) :])
                self._retire(chosen)
        finally:
            with self._lock:
                self._claimed -= merging
        if most_tokens is None:
            self._evict()
        return True

    def after_fork(self) -> None:
        """Resets locks and claims in the child of a fork, which has no other thread."""
        self._lock = threading.Lock()
        self._claimed = set()

    def free_retired(self) -> None:
        """Frees segments that were replaced or evicted some time ago.

        Freeing takes time, and a session releases a segment in the middle of a step: so the last reference is
        kept here, and dropped by the caller of this method.
        """
        while self._leaving and self._leaving[0][0] <= time.monotonic():
            self._leaving.popleft()

    def _due(self, most_tokens: int | None) -> tuple[Segment, ...]:
        """The newest segments to be merged; none that another thread is merging."""
        segments = self._segments
        free = 1 + max((at for at, each in enumerate(segments) if id(each) in self._claimed), default=-1)
        most = self.max_bytes // SHARE
        first = len(segments) - 1
        if first < free:
            return ()
        size, tokens = segments[first].nbytes, segments[first].num_tokens
        while first > free:
            older = segments[first - 1]
            if older.nbytes >= RATIO * size or (older.nbytes + size > most and older.nbytes > most // 2):
                break
            tokens += older.num_tokens
            if most_tokens is not None and tokens > most_tokens:
                break
            size += older.nbytes
            first -= 1
        return segments[first:] if len(segments) - first > 1 else ()

    def _evict(self) -> bool:
        with self._lock:
            gone = 0
            size = segments_nbytes(self._segments)
            while len(self._segments) - gone > 1 and size > self.max_bytes:
                if id(self._segments[gone]) in self._claimed:
                    break
                size -= self._segments[gone].nbytes
                self.evicted += self._segments[gone].num_tokens
                gone += 1
            if gone:
                self._retire(self._segments[:gone])
                self._segments = self._segments[gone:]
        return bool(gone)

    def _retire(self, segments: Sequence[Segment]) -> None:
        self._leaving.append((time.monotonic() + GRACE, segments))
