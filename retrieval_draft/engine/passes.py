"""Forward passes over synthetic trees, to measure their cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from retrieval_draft.drafting.cost import SIZES
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.target import Target

__all__ = ["tree_passes"]


def tree_passes(target: Target, context: int) -> Callable[[int], Tensor]:
    """Fills a cache with random text and returns a function that runs a pass over n nodes after it.

    The nodes are a root and its children, or a chain, which is cut at the end of the longest text.

    Args:
        target: The model.
        context: Tokens in the cache, fewer where the model allows fewer.

    Returns:
        Takes the number of nodes, root included; gives their logits, (n, vocabulary).
    """
    length = context
    is_chain = target.verification.way == "chain"
    most = max(SIZES) if is_chain else 2  # positions of the nodes
    if target.max_positions is not None:
        length = max(1, min(length, target.max_positions - most))
        most = min(most, target.max_positions - length)
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, target.vocabulary, length)).to(target.device)
    cache = target.cache(length + 128)
    for _ in target.prefill(cache, ids, 1):
        pass

    def forward(nodes: int) -> Tensor:
        if is_chain:
            nodes = min(nodes, most)
        tree = DraftTree(
            tokens=rng.integers(0, target.vocabulary, nodes).astype(np.int32),
            parents=np.array([-1] + [0] * (nodes - 1), np.int32),
            depths=np.array([0] + [1] * (nodes - 1), np.int32),
            probs=np.ones(nodes, np.float32),
            path_probs=np.ones(nodes, np.float32),
            sources=np.zeros(nodes, np.int64),
        )
        logits = target.verify_tree(cache, tree, length)
        cache.drop()
        return logits

    return forward
