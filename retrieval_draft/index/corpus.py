"""Corpus indexes that requests draft from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments.index_folder import IndexFolder
from retrieval_draft.index.segments.segment_session import Segments, SegmentSession, segments_nbytes
from retrieval_draft.index.source import BaseSource, TokenArray

__all__ = ["Corpus", "CorpusSource", "make_source"]

_log = logging.getLogger("retrieval_draft")


class Corpus:
    """An index folder, opened for lookups. Its files are mapped: processes share them, opening reads nothing.

    Attributes:
        folder: The index on disk.
        segments: Its segments, oldest first.
    """

    def __init__(self, folder: IndexFolder) -> None:
        self.folder = folder
        self.segments: Segments = folder.segments()

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Opens an index that ``index build`` wrote; ``folder.check`` checks its tokenizer.

        An index without text is logged as a warning.

        Raises:
            DatastoreError: No index, or a torn one.
        """
        corpus = cls(IndexFolder.open(Path(path)))
        if not corpus.segments:
            _log.warning("The index %s holds no text: its build found none, or did not end.", path)
        return corpus

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return segments_nbytes(self.segments)


class CorpusSource(BaseSource):
    """Drafts from corpus indexes; the counts of several are added up.

    Args:
        corpora: The indexes.
    """

    name = "corpus"
    level = "corpus"

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.corpora = tuple(corpora)
        self._segments: Segments = tuple(segment for corpus in corpora for segment in corpus.segments)

    @property
    def segments(self) -> Segments:
        """Segments of all corpora."""
        return self._segments

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SegmentSession:
        """Starts a request with `prompt`, int32, shape (length,); references are not used."""
        return SegmentSession(lambda: self._segments, prompt, self.name, self.level)

    @property
    def nbytes(self) -> int:
        """Bytes of the indexes' files, which are mapped and shared, not held."""
        return sum(corpus.nbytes for corpus in self.corpora)


def make_source(config: DraftConfig, stores: DraftStores) -> CorpusSource | None:
    """A source over the corpora; None without any."""
    return CorpusSource(stores.corpora) if stores.corpora else None
