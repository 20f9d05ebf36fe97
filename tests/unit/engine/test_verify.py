"""Acceptance: the longest path of the target's own choices."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.verify import walk
from tests.support.trees import tree_of


def accept(tree: DraftTree, wanted: list[int]) -> tuple[list[int], int]:
    """The accepted nodes, the root first, and the bonus token."""
    steps = list(walk(tree, lambda node: wanted[node]))
    return [node for node, _ in steps], steps[-1][1]


TREE = tree_of([8, 9, 4, 3], [-1, 0, 1, 0])


@pytest.mark.parametrize(
    ("next_tokens", "path", "bonus"),
    [
        ([9, 5, 0, 0], [0, 1], 5),
        ([9, 4, 7, 0], [0, 1, 2], 7),
        ([3, 0, 0, 0], [0, 3], 0),
        ([0, 9, 9, 9], [0], 0),
        ([4, 9, 9, 9], [0], 4),
    ],
)
def test_accept(next_tokens: list[int], path: list[int], bonus: int) -> None:
    assert accept(TREE, next_tokens) == (path, bonus)


def test_walk_asks_each_accepted_node_once_and_no_other() -> None:
    asked: list[int] = []

    def choose(node: int) -> int:
        asked.append(node)
        return [9, 5, 0, 0][node]

    assert next(walk(TREE, choose)) == (0, 9)
    assert asked == [0]
    asked.clear()
    assert list(walk(TREE, choose)) == [(0, 9), (1, 5)]
    assert asked == [0, 1]


def test_equals_a_slow_walk_on_random_trees() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(1, 30))
        tokens, parents, used = [0], [-1], set()
        for node in range(1, size):
            parent, token = int(rng.integers(0, node)), int(rng.integers(0, 40))
            while (parent, token) in used:
                token += 1
            used.add((parent, token))
            tokens.append(token)
            parents.append(parent)
        wanted = rng.integers(0, 40, size).tolist()
        for node in range(1, size):
            if rng.random() < 0.7:
                wanted[parents[node]] = tokens[node]
        path = [0]
        while True:
            children = [n for n in range(size) if parents[n] == path[-1] and tokens[n] == wanted[path[-1]]]
            if not children:
                break
            path.append(children[0])
        assert accept(tree_of(tokens, parents), wanted) == (path, wanted[path[-1]])
