"""Data that a batch drafts from besides each request's own text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.drafting.calibration import columns_of
from retrieval_draft.index.adjacency import AdjacencyMatrix, AdjacencySource
from retrieval_draft.index.corpus import CorpusSource
from retrieval_draft.index.history import HistorySource
from retrieval_draft.index.phrases import PhraseSource
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.shared import SharedSource
from retrieval_draft.index.source import DraftSource, TokenArray
from retrieval_draft.index.store.store import SharedStore
from retrieval_draft.index.suffix_automaton import AutomatonSource

__all__ = ["Lookups"]


class Lookups:
    """Draft sources as arrays that kernels can read: an adjacency matrix and segments.

    Phrases are looked up in a segment of their own. Sources of other kinds, siblings among them, are left
    out.

    Args:
        sources: In the calibration's order.
        vocabulary: Number of token ids.

    Attributes:
        sources: As given.
        request: Whether requests draft from their own text.
        matrix: The adjacency matrix, which learns from every token, or None.
        store: The shared store, or None.
        supplies: For each source of segments, a function that returns them.
        used: The set of sources in use, a bit mask of their slots in a calibration.
        columns: int64, shape (2,). Indices of automaton and matrix among them; -1 for none.
        group_columns: int64, one for each of `supplies`.
    """

    def __init__(self, sources: Sequence[DraftSource], vocabulary: int) -> None:
        self.sources = tuple(sources)
        self.request = False
        self.matrix: AdjacencyMatrix | None = None
        self.store: SharedStore | None = None
        self.supplies: list[Callable[[], Segments]] = []
        self._history: HistorySource | None = None
        self.columns = np.full(2, -1, np.int64)
        groups: list[int] = []
        asked: list[str] = []
        for source in self.sources:
            column = len(asked)
            if isinstance(source, AutomatonSource):
                self.request, self.columns[0] = True, column
            elif isinstance(source, AdjacencySource):
                self.matrix, self.columns[1] = source.matrix, column
            else:
                supply = self._supply(source, vocabulary)
                if supply is None:
                    continue
                self.supplies.append(supply)
                groups.append(column)
            asked.append(source.name)
        order, self.used = columns_of(tuple(asked))
        self.columns[self.columns >= 0] = order[self.columns[self.columns >= 0]]
        self.group_columns: NDArray[np.int64] = order[groups]
        self._arrays = (AdjacencyMatrix(16, 1) if self.matrix is None else self.matrix).arrays

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Arrays of the matrix, or of an empty one."""
        return self._arrays

    def reading(self) -> AbstractContextManager[Any]:
        """Keeps other threads from writing to the matrix."""
        return nullcontext() if self.matrix is None else self.matrix.lock

    def keep(self, prompt: TokenArray, reply: TokenArray, finished: bool, share: str | None) -> None:
        """Adds a request's text, prompt and reply, int32 each, to history and store."""
        if finished and self.store is not None:
            self.store.share(prompt, reply, share)
        if self._history is not None:
            self._history.keep(prompt, reply)

    def _supply(self, source: DraftSource, vocabulary: int) -> Callable[[], Segments] | None:
        if isinstance(source, HistorySource):
            self._history = source
            history = source.history
            return lambda: history.segments
        if isinstance(source, SharedSource):
            store = self.store = source.store
            return lambda: store.segments
        if isinstance(source, CorpusSource):
            corpus = source.segments
            return lambda: corpus
        if isinstance(source, PhraseSource):
            phrases: Segments = (Segment.build(source.table.phrases, vocabulary),)
            return lambda: phrases
        return None
