"""Texts that methods look up besides the request's: corpora, other servers' replies, earlier requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from retrieval_draft.drafting.hierarchy import OuterSession
from retrieval_draft.index.history import make_source
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.segments.segment_session import Segments
from retrieval_draft.index.source import SourceSession, TokenArray
from retrieval_draft.methods.lookup import MethodSource
from retrieval_draft.methods.method import MethodContext

__all__ = ["Datastore", "StoredSource"]


class Datastore:
    """Segments of every store that a method is given.

    Earlier requests are those of this process, or of `DraftConfig.history_folder`.

    Args:
        parts: Configuration and stores.
        earlier: Whether finished requests are kept and looked up.
    """

    def __init__(self, parts: MethodContext, earlier: bool = True) -> None:
        self._vocabulary = parts.stores.vocabulary
        self._corpora = parts.stores.corpora
        self._shared = parts.stores.shared
        self._history = make_source(parts.config, parts.stores) if earlier else None

    @property
    def corpora(self) -> Segments:
        """Those of the corpora."""
        return tuple(part for corpus in self._corpora for part in corpus.segments)

    @property
    def learned(self) -> Segments:
        """Those of the shared store and of earlier requests, as they are now."""
        shared = self._shared.segments if self._shared else ()
        return (*shared, *(self._history.history.segments if self._history else ()))

    def open(self, references: Sequence[TokenArray] = ()) -> Segments:
        """All segments, after one of a request's reference texts: int32, shape (length,) each."""
        quoted = (Segment.build(references, self._vocabulary),) if references else ()
        return (*quoted, *self.corpora, *self.learned)

    def keep(self, prompt: TokenArray) -> SourceSession | None:
        """A session that adds a request's text at its end; None where none is kept."""
        return self._history.open(prompt) if self._history else None

    @property
    def level(self) -> str:
        """The locality that is told of all of it."""
        return "corpus" if self._corpora else "shared" if self._shared else "history"

    def flush(self) -> None:
        """Waits until finished requests can be looked up."""
        if self._shared:
            self._shared.flush()
        if self._history:
            self._history.flush()

    def close(self) -> None:
        """Adds waiting requests. The shared store, which others may use, stays open."""
        if self._history:
            self._history.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        held = sum(corpus.nbytes for corpus in self._corpora)
        return held + sum(store.nbytes for store in (self._shared, self._history) if store)


class _KeptSession(OuterSession):
    """A method's session, and the one that keeps its text."""

    def __init__(self, session: SourceSession, keeper: SourceSession) -> None:
        self.propose, self.learn = session.propose, session.learn
        self.learns_early = bool(getattr(session, "learns_early", False))
        self.inner = (session, keeper)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        for each in self.inner:
            each.observe(tokens)

    def close(self) -> None:
        """Ends the request, and adds its text."""
        for each in self.inner:
            each.close()


class StoredSource(MethodSource):
    """A method's source over a `Datastore`, which it flushes and closes.

    Args:
        name: The method's name.
        store: Its datastore.
        open_session: Makes a request's session from its prompt and reference texts.
        nbytes: Bytes held between requests besides the datastore's.
        level: Locality of the source.
    """

    def __init__(
        self,
        name: str,
        store: Datastore,
        open_session: Callable[[TokenArray, Sequence[TokenArray]], SourceSession],
        nbytes: Callable[[], int] = lambda: 0,
        level: str = "request",
    ) -> None:
        super().__init__(name, open_session, lambda: store.nbytes + nbytes())
        self.level = level
        self._store = store

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SourceSession:
        """Starts a request with `prompt`, int32, shape (length,), and reference texts, int32 each."""
        session, keeper = super().open(prompt, references), self._store.keep(prompt)
        return session if keeper is None else _KeptSession(session, keeper)

    def flush(self) -> None:
        """Waits until finished requests can be looked up."""
        self._store.flush()

    def close(self) -> None:
        """Adds waiting requests, and closes the datastore."""
        self._store.close()
