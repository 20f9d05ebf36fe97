"""Makes what a method drafts from."""

from __future__ import annotations

from dataclasses import replace

from retrieval_draft.drafting.sources import Datastores
from retrieval_draft.engine.supply import DraftSupply
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.methods.method import Parts
from retrieval_draft.methods.registry import get_method

__all__ = ["make_supply"]


def make_supply(target: Target, parts: Parts) -> DraftSupply:
    """The sources of the configured method, for one model.

    Args:
        target: The model.
        parts: What the sources are made from.

    Raises:
        UnknownMethodError: No method of that name.
        InvalidInputError: The method drafts with a model, and there is none.
    """
    chosen = get_method(parts.config.method)
    if chosen.needs_model and not parts.models:
        raise InvalidInputError(
            f"The method {chosen.name!r} drafts with a model, and there is none.", "Pass draft_model=."
        )
    # Kernels are compiled with a history in memory, lest the user's be written.
    spare = Parts(replace(parts.config, history_folder=None), Datastores(vocabulary=16))
    return DraftSupply(
        target,
        parts.config,
        chosen.sources(parts),
        chosen.tree,
        chosen.nodes,
        lambda: [] if chosen.needs_model else chosen.sources(spare),
    )
