"""Predictions of the target that are no numbers."""

import numpy as np
import pytest

from retrieval_draft._kernels import heap
from retrieval_draft.index.adjacency import AdjacencySource
from retrieval_draft.index.source import NodeLogits
from retrieval_draft.methods.stand import StandTable

NO_NUMBERS = [np.nan, np.inf, -np.inf, -0.5, 2.0, 3e38]


def predictions(*rows: list[float]) -> NodeLogits:
    """After 5 6 7 8 the tokens 9 and 10, with each row's probabilities."""
    count = len(rows)
    return NodeLogits(
        np.tile(np.array([5, 6, 7, 8], np.int32), (count, 1)),
        np.tile(np.array([9, 10], np.int32), (count, 1)),
        np.array(rows, np.float32).reshape(count, 2),
    )


@pytest.mark.parametrize("bad", NO_NUMBERS)
def test_a_position_that_says_no_number_says_nothing(bad: float) -> None:
    kept = predictions([0.5, 0.25], [bad, 0.25], [0.5, bad], [1.0, 0.0])
    assert kept.top_probs.tolist() == [[0.5, 0.25], [1.0, 0.0]]
    assert kept.contexts.shape == (2, 4)
    assert kept.top_tokens.shape == (2, 2)


@pytest.mark.parametrize("bad", NO_NUMBERS)
def test_the_matrix_keeps_what_it_learned(bad: float) -> None:
    source, clean = AdjacencySource(1024, 8), AdjacencySource(1024, 8)
    prompt = np.array([5, 6, 7, 8], np.int32)
    for each in (source, clean):
        each.open(prompt).learn(predictions([0.5, 0.25]))
    source.open(prompt).learn(predictions([bad, bad]))
    found, expected = source.open(prompt).propose(16), clean.open(prompt).propose(16)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.probs.tolist() == expected.probs.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -0.5])
def test_kernels_leave_out_what_reaches_them_all_the_same(bad: float) -> None:
    table = StandTable(64)
    logits = predictions([0.5, 0.25])
    logits.top_probs[0, 0] = bad  # the array is the caller's
    table.learn(logits)
    tokens, probs, _ = table.row(np.array([7, 8], np.int32))
    assert (tokens.tolist(), probs.tolist()) == ([10], [0.25])
    matrix = AdjacencySource(1024, 8).matrix
    matrix.learn(logits)
    assert np.isfinite(matrix._frequent.counts).all()
    assert np.isfinite(matrix._frequent.total).all()


def test_an_id_of_no_vocabulary_takes_no_memory() -> None:
    matrix = AdjacencySource(16, 8).matrix
    before = matrix.nbytes
    logits = predictions([0.5, 0.25])
    logits.top_tokens[0, 0] = 2**31 - 1
    matrix.learn(logits)
    assert matrix.nbytes < before + (1 << 16)


@pytest.mark.parametrize("prob", [np.nan, np.inf, -np.inf, 0.0, -1.0, 1.0, 1e300, 5e-324])
def test_no_path_probability_falls_beside_the_buckets(prob: float) -> None:
    path_probs = np.array([prob])
    histogram, cut, waiting = np.zeros(heap.BUCKETS, np.int64), np.zeros(2, np.int64), np.zeros(4, np.int32)
    assert heap.admit(0, path_probs, path_probs.view(np.int64), waiting, 0, histogram, cut, 0) in (
        True,
        False,
    )
    assert 0 <= cut[heap.CUT] < heap.BUCKETS
