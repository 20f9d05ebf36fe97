"""Self-speculative decoding: the model drafts with some of its layers skipped.

Zhang et al. (Draft & Verify, ACL 2024, arXiv:2309.08168) and Xia et al. (SWIFT, ICLR 2025, arXiv:2410.06916),
with a tree in place of a chain. The layers are found while decoding, by a bounded search in place of SWIFT's
random and Bayesian one, which takes up to a thousand passes: see `LayerSearch`. As in SWIFT, drafts end
where the distribution is flat. The target's own cache of the text serves the drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_draft.engine.draft_models.model_draft import SelfDraft
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.index.source import DraftSource
from retrieval_draft.methods.method import Method, MethodContext, as_proposed

__all__ = ["METHOD"]


def _sources(parts: MethodContext) -> Sequence[DraftSource]:
    models = [model for model in parts.models if isinstance(model, SelfDraft)]
    if not models:
        raise InvalidInputError(
            "The method 'self' drafts with the model itself, and draft_model names another one.",
            'Leave draft_model out, or pass "self" or a SelfDraft; methods for other models are calibrated, '
            "opt_tree, rasd, cascade and ouroboros.",
        )
    return models[:1]


METHOD = Method(
    "self",
    "Xia et al. 2025, arXiv:2410.06916",
    _sources,
    as_proposed,
    nodes=8,
    needs_model=True,
    reads_text=False,
)
