"""Draft sources by name. A new source is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.adjacency import AdjacencySource
from retrieval_draft.index.corpus import Corpus, CorpusSource
from retrieval_draft.index.history import History, HistorySource
from retrieval_draft.index.phrases import PhraseSource, PhraseTable
from retrieval_draft.index.shared import SharedSource
from retrieval_draft.index.siblings import SiblingSource
from retrieval_draft.index.source import DraftSource
from retrieval_draft.index.store.store import SharedStore
from retrieval_draft.index.suffix_automaton import AutomatonSource

__all__ = ["REGISTRY", "DraftStores", "make_sources"]


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


def _history(config: DraftConfig, stores: DraftStores) -> HistorySource:
    folder = None if config.history_folder is None else Path(config.history_folder)
    history = History(stores.vocabulary, config.history_bytes, folder, stores.fingerprint)
    return HistorySource(history, config.history_prompts, config.history_replies)


REGISTRY: dict[str, Callable[[DraftConfig, DraftStores], DraftSource | None]] = {
    "automaton": lambda config, stores: AutomatonSource(),
    "adjacency": lambda config, stores: AdjacencySource(config.adjacency_rows, config.top_k),
    "siblings": lambda config, stores: SiblingSource(),
    "history": _history,
    "shared": lambda config, stores: None if stores.shared is None else SharedSource(stores.shared),
    "phrases": lambda config, stores: None if stores.phrases is None else PhraseSource(stores.phrases),
    "corpus": lambda config, stores: CorpusSource(stores.corpora) if stores.corpora else None,
}
"""Each returns its source, or None where there is nothing for it to draft from."""


def make_sources(config: DraftConfig, stores: DraftStores) -> list[DraftSource]:
    """The sources that `config` names, in its order; none for plain decoding."""
    if config.method == "none":
        return []
    made = (REGISTRY[name](config, stores) for name in config.sources)
    return [source for source in made if source is not None]
