"""Passes over trees against plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.drafting._kernels.tree import fits, write_contexts


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7])
def test_contexts_are_the_text_along_each_path(length: int) -> None:
    rng = np.random.default_rng(length)
    tail = rng.integers(0, 90, length).astype(np.int32)
    parents = np.array([-1, *(int(rng.integers(0, node)) for node in range(1, 20))], np.int32)
    tokens = rng.integers(100, 200, 20).astype(np.int32)
    out = np.zeros((20, 4), np.int32)
    write_contexts(tokens, parents, tail, out)
    for node in range(20):
        path, above = [], node
        while above >= 0:
            path.insert(0, int(tokens[above]))
            above = int(parents[above])
        assert out[node].tolist() == [-1, -1, -1, -1, *tail.tolist(), *path][-4:]


@pytest.mark.parametrize(
    ("tokens", "depths", "expected"),
    [([5, 9], [0, 1], True), ([5, 10], [0, 1], False), ([5, -1], [0, 1], False), ([5, 9], [0, 3], False)],
)
def test_fits(tokens: list[int], depths: list[int], expected: bool) -> None:
    assert fits(np.array(tokens, np.int32), np.array(depths, np.int32), 2, 10) == expected
