"""Drafts from what all servers of a tenant said, their own replies among them."""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments.segment_session import SegmentSession
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.store.store import SharedStore

__all__ = ["SharedSource", "make_source"]


class SharedSource:
    """Looks the shared datastore up; what goes into it is handed to the store at the end of a request.

    Args:
        store: The server's copy of the log. Lookups are local. Whoever opened it closes it.

    Example:
        another server has said 7 8 9 4; prompt 5 7 8: propose(2)  ->  tokens [9, 4], level "shared"
    """

    name = "shared"
    level = "shared"

    def __init__(self, store: SharedStore) -> None:
        self.store = store

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SegmentSession:
        """Starts a request; references are the request's own and are not used."""
        store = self.store
        return SegmentSession(lambda: store.segments, prompt, self.name, self.level)

    def flush(self) -> None:
        """Waits until what finished requests shared can be looked up here, unless the store is down."""
        self.store.flush()

    def close(self) -> None:
        """Does nothing: the store may serve other drafters, and takes runs where nothing is drafted."""

    @property
    def nbytes(self) -> int:
        """Bytes of shared text and of what waits to be sent."""
        return self.store.nbytes


def make_source(config: DraftConfig, stores: DraftStores) -> SharedSource | None:
    """A source over the shared store; None without one."""
    return None if stores.shared is None else SharedSource(stores.shared)
