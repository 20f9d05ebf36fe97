"""Drafts from the replies of all servers of a tenant, this one's among them."""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments.segment_session import SegmentSession
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.store.store import SharedStore

__all__ = ["SharedSource", "make_source"]


class SharedSource:
    """Looks up the shared datastore; a request's text is added to the store at its end.

    Args:
        store: The server's copy of the log. Lookups are local. The code that opened it closes it.

    Example:
        another server has generated 7 8 9 4; prompt 5 7 8: propose(2)  ->  tokens [9, 4], level "shared"
    """

    name = "shared"
    level = "shared"

    def __init__(self, store: SharedStore) -> None:
        self.store = store

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SegmentSession:
        """Starts a request with `prompt`, int32, shape (length,); references are not used."""
        store = self.store
        return SegmentSession(lambda: store.segments, prompt, self.name, self.level)

    def flush(self) -> None:
        """Waits until texts of finished requests can be looked up here, unless the store is down."""
        self.store.flush()

    def close(self) -> None:
        """Does nothing: the store may serve other drafters, and accepts texts without drafting."""

    @property
    def nbytes(self) -> int:
        """Bytes of shared text and of texts waiting to be sent."""
        return self.store.nbytes


def make_source(config: DraftConfig, stores: DraftStores) -> SharedSource | None:
    """A source over the shared store; None without one."""
    return None if stores.shared is None else SharedSource(stores.shared)
