"""Draft sources of a method for a model."""

from __future__ import annotations

from dataclasses import replace

from retrieval_draft.engine.draft_engine import DraftEngine
from retrieval_draft.engine.target import Target
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.methods.method import MethodContext
from retrieval_draft.methods.registry import get_method

__all__ = ["make_draft_engine"]


def make_draft_engine(target: Target, parts: MethodContext) -> DraftEngine:
    """The sources of the configured method, for one model.

    Args:
        target: The model.
        parts: Parts that the sources are made from.

    Raises:
        UnknownMethodError: No method of that name.
        InvalidInputError: The method drafts with a model, and there is none.
    """
    chosen = get_method(parts.config.method)
    # Kernels are compiled with a history in memory, so that the user's is not written.
    spare = MethodContext(replace(parts.config, history_folder=None), DraftStores(vocabulary=16))
    return DraftEngine(
        target,
        parts.config,
        chosen.sources(parts),
        chosen.tree,
        chosen.nodes,
        lambda: [] if chosen.needs_model else chosen.sources(spare),
        chosen.costs,
    )
