from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_draft.drafting.calibration import AGREEMENT, AGREEMENT_ODDS, Calibration
from retrieval_draft.drafting.fusion import fuse
from retrieval_draft.index.source import Proposal
from tests.support.sources import proposal_of as proposal


def test_docstring_example() -> None:
    tree = fuse(
        8,
        [proposal([9, 4], [-1, 0], [0.8, 0.5]), proposal([9, 3], [-1, -1], [0.5, 0.1], "b")],
        Calibration(priors=False),
        10,
    )
    assert tree.tokens.tolist() == [8, 9, 4, 3]
    assert tree.parents.tolist() == [-1, 0, 1, 0]
    assert tree.depths.tolist() == [0, 1, 2, 1]
    assert tree.sources.tolist() == [0, 3, 1, 2]
    np.testing.assert_allclose(tree.path_probs, [1, 0.756, 0.378, 0.1], rtol=1e-3)


def test_no_proposals_and_no_budget_give_the_root() -> None:
    assert len(fuse(5, [], Calibration(priors=False), 10)) == 1
    assert len(fuse(5, [proposal([1], [-1], [0.5])], Calibration(priors=False), 0)) == 1


def test_the_same_word_from_two_sources_is_one_path() -> None:
    one = proposal([1, 2, 3], [-1, 0, 1], [0.5, 0.5, 0.5])
    tree = fuse(0, [one, one], Calibration(priors=False), 10)
    assert tree.tokens.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("prob", [1.0, 0.999, 1e-7, 1e-30])
def test_ties_and_underflow_stay_prefix_closed(prob: float) -> None:
    size = 200
    parents = [-1] + [i // 2 for i in range(size - 1)]
    tokens = list(range(size))
    for budget in (1, 7, 64, 200):
        tree = fuse(0, [proposal(tokens, parents, [prob] * size)], Calibration(priors=False), budget)
        assert len(tree) == budget + 1
        assert np.all(tree.parents[1:] < np.arange(1, budget + 1))
        assert np.all(np.diff(tree.path_probs) <= 0)


TREES = st.lists(st.tuples(st.integers(-1, 30), st.integers(0, 5), st.floats(0.01, 1.0)), max_size=40)


def as_proposal(items: list[tuple[int, int, float]], source: str) -> Proposal:
    tokens: list[int] = []
    parents: list[int] = []
    probs: list[float] = []
    seen: set[tuple[int, int]] = set()
    for parent, token, prob in items:
        above = min(parent, len(tokens) - 1)
        if (above, token) not in seen:
            seen.add((above, token))
            tokens.append(token)
            parents.append(above)
            probs.append(prob)
    return proposal(tokens, parents, probs, source)


def naive(proposals: list[Proposal]) -> dict[tuple[int, ...], float]:
    """Path to path probability of the whole union, mixed with the weights that it starts with."""
    log_odds: dict[tuple[int, ...], list[float]] = {}
    for given_tree in proposals:
        paths: list[tuple[int, ...]] = []
        for token, parent, prob in zip(
            given_tree.tokens.tolist(), given_tree.parents.tolist(), given_tree.probs.tolist(), strict=True
        ):
            path = (*(paths[parent] if parent >= 0 else ()), token)
            paths.append(path)
            kept = min(max(prob, 1e-6), 0.999)
            log_odds.setdefault(path, []).append(math.log(kept / (1 - kept)))
    out: dict[tuple[int, ...], float] = {}
    for path in sorted(log_odds, key=len):
        odds = log_odds[path]
        mixed = odds[0] if len(odds) == 1 else AGREEMENT * sum(odds) / len(odds) + AGREEMENT_ODDS
        out[path] = out.get(path[:-1], 1.0) * min(max(1 / (1 + math.exp(-mixed)), 1e-6), 0.999)
    return out


@given(TREES, TREES, st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_the_tree_is_the_best_prefix_closed_set(
    first: list[tuple[int, int, float]], second: list[tuple[int, int, float]], budget: int
) -> None:
    proposals = [as_proposal(first, "a"), as_proposal(second, "b")]
    expected = naive(proposals)
    tree = fuse(99, proposals, Calibration(priors=False), budget)
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(tree)):
        paths.append((*paths[tree.parents[node]], int(tree.tokens[node])))
        assert tree.depths[node] == len(paths[-1])
        np.testing.assert_allclose(tree.path_probs[node], expected[paths[-1]], rtol=1e-4)
    assert len(set(paths)) == len(paths)
    assert len(tree) == min(budget, len(expected)) + 1
    best = sorted(expected.values(), reverse=True)[: len(tree) - 1]
    np.testing.assert_allclose(sorted(tree.path_probs[1:].tolist(), reverse=True), best, rtol=1e-4)


odd_numbers = st.one_of(
    st.floats(0, 1, width=32), st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 7.0, 1e-40])
)
odd_nodes = st.lists(
    st.tuples(
        st.integers(-2, 50),
        st.sampled_from([-1, -1, 0, 1, 2, 5, -7, 2**31 - 1, -(2**31)]),
        odd_numbers,
        st.sampled_from([0, 1, 40, -3, 2**31 - 1]),
    ),
    max_size=9,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(odd_nodes, min_size=1, max_size=10), st.integers(1, 12))
def test_whatever_sources_propose_is_a_tree_and_teaches_no_nonsense(proposed: list, budget: int) -> None:
    proposals = []
    for number, nodes in enumerate(proposed):
        tokens, parents, probs, lengths = (
            (list(column) for column in zip(*nodes, strict=True)) if nodes else [[]] * 4
        )
        made = proposal(tokens, parents, probs, f"source {number}")
        proposals.append(dataclasses.replace(made, match_lengths=np.array(lengths, np.int32)))
    calibration = Calibration()
    for _ in range(3):
        tree = fuse(8, proposals, calibration, budget)
        assert len(tree) <= budget + 1
        assert all(0 <= parent < node for node, parent in enumerate(tree.parents.tolist()) if node)
        assert ((tree.probs > 0) & (tree.probs <= 1)).all()
        assert (np.diff(tree.path_probs) <= 0).all()
        calibration.observe(tree, proposals, np.array([tree.tokens[-1], 3], np.int32))
    for kept in (calibration.weights, calibration.parameters, calibration.expected, calibration.accepted,
                 calibration.request, calibration.sharpness):  # fmt: skip
        assert np.isfinite(kept).all()


@pytest.mark.parametrize("name", ["weights", "parameters", "request", "expected", "accepted"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e308])
def test_a_calibration_that_holds_no_numbers_still_gives_a_tree(name: str, bad: float) -> None:
    calibration = Calibration()
    getattr(calibration, name)[...] = bad
    proposals = [proposal([9, 4], [-1, 0], [0.8, 0.5], "automaton")]
    tree = fuse(8, proposals, calibration, 4)
    assert sorted(tree.tokens.tolist()) == [4, 8, 9]
    calibration.observe(tree, proposals, np.array([9, 4], np.int32))
