"""OPT-Tree: the tree of a draft model with the most expected accepted tokens."""

from __future__ import annotations

import numpy as np

from retrieval_draft.config import DraftConfig
from retrieval_draft.engine.draft_models.model_draft import ModelDraft
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.methods.method import MethodContext
from retrieval_draft.methods.registry import get_method
from tests.support.models import make


def test_the_largest_path_products_are_kept_closed_under_parents() -> None:
    parts = MethodContext(DraftConfig(), DraftStores(97), (ModelDraft(make("llama"), 97),))
    (source,) = get_method("opt_tree").sources(parts)
    session = source.open(np.arange(1, 20, dtype=np.int32))
    for budget in (5, 50):
        proposal = session.propose(budget)
        assert len(proposal) == budget
        assert np.all(proposal.parents < np.arange(budget))
        paths: list[float] = []
        for parent, prob in zip(proposal.parents.tolist(), proposal.probs.tolist(), strict=True):
            paths.append(prob * (paths[parent] if parent >= 0 else 1.0))
        assert paths == sorted(paths, reverse=True)
    session.observe(np.array([5], np.int32))
    assert len(session.propose(3)) == 3
