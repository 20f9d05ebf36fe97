"""Draft sources by name. A new source is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.adjacency import AdjacencySource
from retrieval_draft.index.source import DraftSource
from retrieval_draft.index.suffix_automaton import AutomatonSource

__all__ = ["REGISTRY", "make_sources"]

REGISTRY: dict[str, Callable[[DraftConfig], DraftSource]] = {
    "automaton": lambda config: AutomatonSource(),
    "adjacency": lambda config: AdjacencySource(config.adjacency_rows, config.top_k),
}


def make_sources(config: DraftConfig) -> list[DraftSource]:
    """The sources that `config` names, in its order; none for plain decoding."""
    return [] if config.method == "none" else [REGISTRY[name](config) for name in config.sources]
