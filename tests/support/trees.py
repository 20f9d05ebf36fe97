"""Draft trees from tokens and parents."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.drafting.tree import DraftTree


def ancestors(tree: DraftTree) -> NDArray[np.bool_]:
    """Ancestor matrix: bool, shape (n + 1, n + 1), [i, j] true if j is i or above i.

    Example:
        parents [-1, 0, 1, 0]  ->  T...   TT..   TTT.   T..T
    """
    seen = np.eye(len(tree), dtype=np.bool_)
    for node in range(1, len(tree)):
        seen[node] |= seen[tree.parents[node]]
    return seen


def tree_of(tokens: list[int], parents: list[int]) -> DraftTree:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    size = len(tokens)
    ones = np.ones(size, np.float32)
    return DraftTree(
        np.array(tokens, np.int32), np.array(parents, np.int32), np.array(depths, np.int32), ones, ones,
        np.zeros(size, np.int64),
    )  # fmt: skip
