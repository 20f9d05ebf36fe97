"""RASD: retrieval pruned by the draft model's first tokens, joined by longest prefix."""

from __future__ import annotations

import numpy as np

from retrieval_draft.index.source import Proposal
from retrieval_draft.methods.rasd import join


def proposal(tokens: list[int], parents: list[int]) -> Proposal:
    size = len(tokens)
    return Proposal(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.full(size, 0.5, np.float32),
        np.ones(size, np.int32),
        "x",
        "model",
    )


def test_docstring_example() -> None:
    model = proposal([9, 4, 3], [-1, 0, -1])
    found = proposal([9, 5, 7, 1], [-1, 0, -1, 2])
    tree = join(model, [found], 4).proposal(4)
    assert tree.tokens.tolist() == [9, 4, 5, 3]
    assert tree.parents.tolist() == [-1, 0, 0, -1]


def test_half_is_the_models_and_what_is_left_goes_to_the_other() -> None:
    model = proposal(list(range(10, 20)), [-1] * 10)
    found = proposal([10, 1, 2, 3, 4], [-1, 0, 1, 2, 3])
    tree = join(model, [found], 8).proposal(8)
    assert tree.tokens.tolist() == [10, 11, 12, 13, 1, 2, 3, 4]
    assert join(model, [], 8).proposal(8).tokens.tolist() == list(range(10, 18))


def test_retrieval_alone_without_a_first_token_of_the_model_is_dropped() -> None:
    assert len(join(proposal([], []), [proposal([1, 2], [-1, 0])], 8)) == 0
