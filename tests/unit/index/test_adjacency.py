from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.index.adjacency import BACKOFF, VISITS, AdjacencyMatrix, AdjacencySource
from retrieval_draft.index.source import NodeLogits
from tests.support.tokens import ids


def predictions(context: list[int], tokens: list[int], probs: list[float]) -> NodeLogits:
    return NodeLogits(
        np.array([context], np.int32), np.array([tokens], np.int32), np.array([probs], np.float32)
    )


def test_docstring_example() -> None:
    source = AdjacencySource(rows=64)
    session = source.open(ids(1, 2, 5, 7))
    session.learn(predictions([-1, -1, 5, 7], [9, 4], [0.6, 0.3]))
    proposal = session.propose(2)
    assert proposal.tokens.tolist() == [9, 4]
    assert proposal.parents.tolist() == [-1, -1]
    assert source.matrix.row(ids(5, 7))[0].tolist() == [9, 4]
    assert source.matrix.row(ids(7))[2] == 1
    assert source.matrix.row(ids(5))[2] == 0


def test_a_matrix_that_learned_nothing_proposes_nothing() -> None:
    session = AdjacencySource(rows=64).open(ids(1, 2, 3, 4))
    assert len(session.propose(16)) == 0


def test_after_an_unseen_token_come_frequent_ones() -> None:
    session = AdjacencySource(rows=64).open(ids(1, 2, 3, 4))
    session.learn(predictions([-1, -1, -1, 9], [20, 21], [0.9, 0.1]))
    session.learn(predictions([-1, -1, -1, 8], [20, 22], [0.7, 0.3]))
    proposal = session.propose(3)
    assert proposal.tokens.tolist() == [20, 22, 21]
    assert proposal.parents.tolist() == [-1, -1, -1]
    assert proposal.match_lengths.tolist() == [0, 0, 0]
    np.testing.assert_allclose(proposal.probs, np.array([1.6, 0.3, 0.1]) / (2 + BACKOFF[0]), rtol=1e-5)


def test_token_zero_is_a_token() -> None:
    session = AdjacencySource(rows=64).open(ids(0))
    session.learn(predictions([-1, -1, -1, 0], [0, 3], [0.7, 0.2]))
    assert session.propose(1).tokens.tolist() == [0]


def test_observations_are_averaged() -> None:
    matrix = AdjacencyMatrix(rows=64, top_k=4)
    matrix.learn(predictions([1, 2, 3, 4], [10, 11], [0.8, 0.2]))
    matrix.learn(predictions([1, 2, 3, 4], [11, 12], [0.6, 0.4]))
    tokens, probs, visits = matrix.row(ids(1, 2, 3, 4))
    assert visits == 2
    assert tokens.tolist() == [10, 11, 12]  # .4 and .4: the one known longer stays first
    np.testing.assert_allclose(probs, [0.4, 0.4, 0.2], rtol=1e-6)


def test_an_old_row_still_follows_the_text() -> None:
    matrix = AdjacencyMatrix(rows=64)
    for _ in range(10 * VISITS):
        matrix.learn(predictions([-1, -1, -1, 4], [10], [1.0]))
    for _ in range(3 * VISITS):
        matrix.learn(predictions([-1, -1, -1, 4], [11], [1.0]))
    assert matrix.row(ids(4))[0][0] == 11


def test_rejected_nodes_and_longer_contexts_decide() -> None:
    session = AdjacencySource(rows=256).open(ids(1, 2, 3, 4))
    session.learn(predictions([9, 9, 9, 4], [20], [0.9]))
    session.learn(predictions([1, 2, 3, 4], [30], [0.9]))
    proposal = session.propose(2)
    assert proposal.tokens.tolist() == [30, 20]
    assert proposal.match_lengths.tolist() == [4, 1]


def test_fixed_size_and_eviction_of_the_oldest() -> None:
    matrix = AdjacencyMatrix(rows=16)
    matrix.learn(predictions([-1, -1, -1, 0], [500], [0.5]))  # the largest id: counts of tokens grow with it
    size = matrix.nbytes
    for token in range(500):
        matrix.learn(predictions([-1, -1, -1, token], [token + 1], [0.5]))
    assert matrix.nbytes == size
    assert matrix.filled <= 16
    assert matrix.row(ids(499))[0].tolist() == [500]
    assert matrix.row(ids(0))[2] == 0


def test_a_row_narrower_than_what_is_observed_keeps_the_best() -> None:
    matrix = AdjacencyMatrix(rows=64, top_k=2)
    matrix.learn(predictions([-1, -1, -1, 1], [5, 6, 7], [0.5, 0.3, 0.1]))
    assert matrix.row(ids(1))[0].tolist() == [5, 6]


@pytest.mark.parametrize("budget", [0, 1, 64])
def test_trees_of_any_budget(budget: int) -> None:
    session = AdjacencySource(rows=4096).open(ids(3))
    rng = np.random.default_rng(1)
    for _ in range(300):
        session.learn(
            predictions([-1, -1, -1, int(rng.integers(20))], rng.permutation(20)[:8].tolist(), [0.12] * 8)
        )
    proposal = session.propose(budget)
    assert len(proposal) == budget
    assert np.all(proposal.parents < np.arange(budget))
    for parent in range(-1, budget):
        children = proposal.tokens[proposal.parents == parent]
        assert len(set(children.tolist())) == len(children)
