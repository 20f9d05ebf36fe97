"""Draft trees from tokens and parents."""

from __future__ import annotations

import numpy as np

from retrieval_draft.drafting.tree import DraftTree


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
