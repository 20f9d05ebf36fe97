"""This project's own method: every source, one tree by calibrated probabilities, as large as it pays."""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_draft.drafting.fusion import fuse
from retrieval_draft.drafting.pacing import PacedSource
from retrieval_draft.drafting.sources import make_sources
from retrieval_draft.index.source import DraftSource
from retrieval_draft.methods.method import Method, MethodContext

__all__ = ["METHOD"]


def _sources(parts: MethodContext) -> Sequence[DraftSource]:
    # A model's time counts only where the budget may depend on it.
    paced = parts.config.nodes is None
    models = [PacedSource(model) if paced else model for model in parts.models]
    return [*make_sources(parts.config, parts.stores), *models]


METHOD = Method("calibrated", "this project", _sources, fuse, nodes=None, calibrates=True)
