"""Datastores that sources are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # their modules import this one
    from retrieval_draft.index.corpus import Corpus
    from retrieval_draft.index.phrases import PhraseTable
    from retrieval_draft.index.store.store import SharedStore

__all__ = ["DraftStores"]


@dataclass(frozen=True, slots=True)
class DraftStores:
    """Data that sources are made from besides the configuration.

    Attributes:
        vocabulary: Number of token ids.
        fingerprint: Of the tokenizer; empty where there is none.
        corpora: Opened indexes.
        phrases: Fixed texts, or None.
        shared: Store that servers share, or None.
        owns_shared: Whether `shared` was opened for the drafter, and ends with it.
    """

    vocabulary: int
    fingerprint: str = ""
    corpora: tuple[Corpus, ...] = ()
    phrases: PhraseTable | None = None
    shared: SharedStore | None = None
    owns_shared: bool = True
