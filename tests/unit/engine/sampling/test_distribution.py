"""Tokens emitted along a tree follow the target's distribution; the known wrong rules are caught."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.engine.verify import walk
from tests.support.distributions import chi_square_z, excess_variation
from tests.support.trees import tree_of

VOCABULARY = 5
RUNS = 20_000
TREE = tree_of([0, 1, 2, 0, 3, 1, 4, 2], [-1, 0, 0, 0, 1, 1, 2, 4])
"""Root, children 1 2 0; below 1 are 3 and 1, below 2 is 4, below 1 3 is 2."""

Rule = Callable[[int], tuple[int, ...]]


def distributions() -> np.ndarray:
    """The target's distribution at each node of the tree: float64, shape (nodes, VOCABULARY)."""
    return np.random.default_rng(4).dirichlet(np.full(VOCABULARY, 0.8), len(TREE.tokens))


def child_of(node: int, token: int) -> int | None:
    """The node of `token` below `node`, if the tree has one."""
    found = np.flatnonzero((TREE.parents == node) & (TREE.tokens == token))
    return int(found[0]) if len(found) else None


def joint(distribution: np.ndarray) -> dict[tuple[int, ...], float]:
    """Probability of each path that a walk can emit: it ends where the tree does."""
    out: dict[tuple[int, ...], float] = {}

    def follow(node: int, path: tuple[int, ...], prob: float) -> None:
        for token in range(VOCABULARY):
            child = child_of(node, token)
            if child is not None:
                follow(child, (*path, token), prob * distribution[node, token])
            else:
                out[(*path, token)] = prob * distribution[node, token]

    follow(0, (), 1.0)
    return out


def ours(seed: int) -> tuple[int, ...]:
    noise = GumbelNoise(seed, VOCABULARY, torch.device("cpu"))
    scores = torch.from_numpy(np.log(distributions())).float()

    def choose(node: int) -> int:
        return noise.draw(scores[node], 7 + int(TREE.depths[node]))

    return tuple(token for _, token in walk(TREE, choose))


def paths() -> list[list[int]]:
    leaves = [n for n in range(1, len(TREE.tokens)) if n not in TREE.parents]
    out = []
    for leaf in leaves:
        path = [leaf]
        while TREE.parents[path[0]] >= 0:
            path.insert(0, int(TREE.parents[path[0]]))
        out.append(path)
    return out


def one_draw_for_each_path(seed: int) -> tuple[int, ...]:
    """REST, ADED, RACER: every path draws on its own, the longest match wins, a miss is drawn again."""
    rng, distribution = np.random.default_rng(seed), distributions()
    best: list[int] = [0]
    for path in paths():
        taken = [0]
        for node in path[1:]:
            if rng.choice(VOCABULARY, p=distribution[taken[-1]]) != TREE.tokens[node]:
                break
            taken.append(node)
        best = max(best, taken, key=len)
    bonus = int(rng.choice(VOCABULARY, p=distribution[best[-1]]))
    return _to_the_end([int(TREE.tokens[node]) for node in best[1:]] + [bonus], distribution, rng)


def redraw_after_a_miss(seed: int) -> tuple[int, ...]:
    """One draw for each node, but a token that no child holds is thrown away and drawn anew."""
    rng, distribution = np.random.default_rng(seed), distributions()
    node, out = 0, []
    while True:
        token = int(rng.choice(VOCABULARY, p=distribution[node]))
        child = child_of(node, token)
        if child is None:
            out.append(int(rng.choice(VOCABULARY, p=distribution[node])))
            return _to_the_end(out, distribution, rng)
        node = child
        out.append(token)


def _to_the_end(emitted: list[int], distribution: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """Goes on plainly where the emitted tokens still lie in the tree, so that outcomes can be compared."""
    nodes = TREE.walk(np.array(emitted, np.int32))
    while len(nodes) > len(emitted):
        token = int(rng.choice(VOCABULARY, p=distribution[nodes[-1]]))
        emitted = [*emitted, token]
        nodes = TREE.walk(np.array(emitted, np.int32))
    return tuple(emitted)


def test_the_walk_follows_the_law() -> None:
    distribution, samples = joint(distributions()), [ours(seed) for seed in range(RUNS)]
    assert abs(sum(distribution.values()) - 1.0) < 1e-9
    assert chi_square_z(samples, distribution) < 4
    assert excess_variation(samples, distribution) < 1.8


@pytest.mark.parametrize("rule", [one_draw_for_each_path, redraw_after_a_miss])
def test_wrong_rules_are_caught(rule: Rule) -> None:
    distribution, samples = joint(distributions()), [rule(seed) for seed in range(RUNS // 4)]
    assert chi_square_z(samples, distribution) > 8
    assert excess_variation(samples, distribution) > 2


def test_the_tests_of_laws_know_right_from_wrong() -> None:
    rng = np.random.default_rng(0)
    distribution = {token: 1 / 6 for token in range(6)}
    fair = rng.integers(0, 6, 6000).tolist()
    assert abs(chi_square_z(fair, distribution)) < 3.5
    assert excess_variation(fair, distribution) < 1.5
    loaded = rng.choice(6, 6000, p=[0.2, 0.2, 0.15, 0.15, 0.15, 0.15]).tolist()
    assert chi_square_z(loaded, distribution) > 5
    assert chi_square_z([7], distribution) == float("inf")
