"""Lossless speculative decoding from text that was seen before. No training, no second model.

    from retrieval_draft import RetrievalDrafter

    drafter = RetrievalDrafter.for_model(model, tokenizer)
    output = drafter.generate(**inputs, max_new_tokens=256)

Names load on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrieval_draft.config import DraftConfig
    from retrieval_draft.drafter import RetrievalDrafter
    from retrieval_draft.drafting.grammar.grammar import Grammar
    from retrieval_draft.drafting.tree import DraftTree
    from retrieval_draft.errors import RetrievalDraftError
    from retrieval_draft.index.source import DraftSource, NodeLogits, Proposal
    from retrieval_draft.index.store.config import StoreConfig
    from retrieval_draft.index.store.store import SharedStore
    from retrieval_draft.proposer import Proposer

__version__ = "0.2.0"

__all__ = [
    "DraftConfig",
    "DraftSource",
    "DraftTree",
    "Grammar",
    "NodeLogits",
    "Proposal",
    "Proposer",
    "RetrievalDraftError",
    "RetrievalDrafter",
    "SharedStore",
    "StoreConfig",
    "__version__",
]

_HOME = {
    "DraftConfig": "retrieval_draft.config",
    "DraftSource": "retrieval_draft.index.source",
    "DraftTree": "retrieval_draft.drafting.tree",
    "Grammar": "retrieval_draft.drafting.grammar.grammar",
    "NodeLogits": "retrieval_draft.index.source",
    "Proposal": "retrieval_draft.index.source",
    "Proposer": "retrieval_draft.proposer",
    "RetrievalDraftError": "retrieval_draft.errors",
    "RetrievalDrafter": "retrieval_draft.drafter",
    "SharedStore": "retrieval_draft.index.store.store",
    "StoreConfig": "retrieval_draft.index.store.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'retrieval_draft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
