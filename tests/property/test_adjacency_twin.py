"""The adjacency matrix against dictionaries of exact n-grams."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_draft.index.adjacency import BACKOFF, VISITS, AdjacencyMatrix
from retrieval_draft.index.source import NodeLogits

ROW = st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True)
SEEN = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=4), ROW, st.integers(0, 1000)),
    min_size=1,
    max_size=25,
)
Rows = dict[tuple[int, ...], tuple[int, dict[int, float]]]


def learn(rows: Rows, context: list[int], top: dict[int, float]) -> None:
    """The rule of the kernel: the n-th observation weighs 1/n, then 1/VISITS."""
    for order in range(1, len(context) + 1):
        visits, row = rows.get(tuple(context[-order:]), (0, {}))
        visits = min(visits, VISITS - 1) + 1
        fresh = 1 / visits
        mixed = {token: prob * (1 - fresh) for token, prob in row.items()} if visits > 1 else {}
        for token, prob in top.items():
            mixed[token] = mixed.get(token, 0.0) + fresh * prob
        rows[tuple(context[-order:])] = (visits, mixed)


def children(rows: Rows, counts: dict[int, float], context: tuple[int, ...]) -> dict[int, float]:
    out: dict[int, float] = {}
    mass = 1.0
    for order in range(min(4, len(context)), 0, -1):
        if context[-order:] in rows:
            visits, row = rows[context[-order:]]
            weight = mass * visits / (visits + BACKOFF[order])
            mass -= weight
            for token, prob in row.items():
                out[token] = out.get(token, 0.0) + weight * prob
    for token, count in counts.items():
        out[token] = out.get(token, 0.0) + mass * count / (sum(counts.values()) + BACKOFF[0])
    return out


def both(seen: list[tuple[list[int], list[int], int]]) -> tuple[AdjacencyMatrix, Rows, dict[int, float]]:
    """The matrix, exact rows and exact counts of all tokens; fewer than are kept as frequent."""
    matrix, rows, counts = AdjacencyMatrix(rows=1 << 14, top_k=8), {}, {}
    for context, tokens, seed in seen:
        probs = np.sort(np.random.default_rng(seed).dirichlet(np.ones(len(tokens) + 1))[:-1])[::-1]
        padded = [-1] * (4 - len(context)) + context
        matrix.learn(
            NodeLogits(
                np.array([padded], np.int32),
                np.array([tokens], np.int32),
                np.array([probs], np.float32),
            )
        )
        learn(rows, context, dict(zip(tokens, probs.tolist(), strict=True)))
        for token, prob in zip(tokens, probs.tolist(), strict=True):
            counts[token] = counts.get(token, 0.0) + prob
    return matrix, rows, counts


@given(SEEN)
@settings(max_examples=100, deadline=None)
def test_rows_are_the_averages(seen: list[tuple[list[int], list[int], int]]) -> None:
    matrix, rows, _ = both(seen)
    for context, (visits, row) in rows.items():
        tokens, probs, found = matrix.row(np.array(context, np.int32))
        assert found == visits
        assert set(tokens.tolist()) == set(row)
        assert np.all(np.diff(probs) <= 0)
        np.testing.assert_allclose(probs, [row[token] for token in tokens.tolist()], rtol=1e-4, atol=1e-6)


@given(SEEN, st.lists(st.integers(0, 3), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_tree_is_the_blend_of_all_orders(
    seen: list[tuple[list[int], list[int], int]], context: list[int]
) -> None:
    matrix, rows, counts = both(seen)
    tail = np.array([-1] * (4 - len(context)) + context, np.int32)
    proposal = matrix.propose(tail, 200, matrix.workspace())
    paths: list[tuple[int, ...]] = []
    probs: list[float] = []
    for token, parent, prob in zip(proposal.tokens, proposal.parents, proposal.probs, strict=True):
        above, path = (paths[parent], probs[parent]) if parent >= 0 else ((), 1.0)
        expected = children(rows, counts, (*context, *above))
        # A frequent token's share is left out where its path could not enter the tree.
        np.testing.assert_allclose(prob, min(expected[int(token)], 0.999), rtol=1e-3, atol=2**-16 / path)
        paths.append((*above, int(token)))
        probs.append(float(prob) * path)
    assert len(set(paths)) == len(paths)
    assert np.all(np.diff(probs) <= 1e-6), "best first"
    if len(proposal) < 200:
        missing = {
            (token,) for token, prob in children(rows, counts, tuple(context)).items() if prob > 2**-15
        }
        assert missing <= set(paths)
