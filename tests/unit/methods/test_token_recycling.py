"""Token Recycling: the template of ranks, and rows that verified nodes overwrite."""

from __future__ import annotations

from collections import Counter

import numpy as np

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import NodeLogits
from retrieval_draft.methods.method import MethodContext
from retrieval_draft.methods.token_recycling import METHOD, TEMPLATE, RecycledTokens
from tests.support.tokens import ids


def source(vocabulary=16):
    (made,) = METHOD.sources(MethodContext(DraftConfig(), DraftStores(vocabulary)))
    return made


def predictions(*rows):
    """Rows of (token, its next tokens best first), padded to the widest with -1."""
    width = max((len(best) for _, best in rows), default=1)
    contexts = np.array([[-1, -1, -1, token] for token, _ in rows], np.int32).reshape(-1, 4)
    best = np.array([[*best, *[-1] * (width - len(best))] for _, best in rows], np.int32).reshape(-1, width)
    return NodeLogits(contexts, best, np.full(best.shape, 0.1, np.float32))


def paths(nodes):
    found = []
    for parent, rank in nodes:
        found.append((*(found[parent] if parent >= 0 else ()), rank))
    return found


def test_the_template_has_the_published_levels():
    sizes = Counter(len(path) for path in paths(TEMPLATE))
    assert [sizes[level] for level in range(1, 7)] == [8, 21, 25, 15, 8, 3]
    assert METHOD.nodes == len(TEMPLATE) == len(set(paths(TEMPLATE))) == 80
    assert all(parent < node for node, (parent, _) in enumerate(TEMPLATE))


def test_the_template_follows_zipfs_law():
    """Of two ranks in a row, 21 have a product of (rank + 1) up to 9: exactly the second level."""
    second = {path for path in paths(TEMPLATE) if len(path) == 2}
    assert second == {(a, b) for a in range(8) for b in range(8) if (a + 1) * (b + 1) <= 9}
    # 1 + 1/2 + .. + 1/8 is 2.718, so the chances are .368, .184, .368 * .368 = .135, .123, .092, .074
    assert paths(TEMPLATE)[:6] == [(0,), (1,), (0, 0), (2,), (3,), (4,)]


def test_rows_fill_the_template():
    opened = source().open(ids(1, 7))
    opened.learn(predictions((7, [9, 4]), (9, [2]), (4, [7])))
    proposal = opened.propose(80)
    # ranks 0, 1, 00, (10), (000) ..: below 9 comes 2, below 4 comes 7 whose row starts again
    pairs = zip(proposal.parents, proposal.tokens, strict=True)
    found = paths(pairs)
    assert found[:4] == [(9,), (4,), (9, 2), (4, 7)]
    assert (4, 7, 9) in found
    assert (4, 7, 4) in found
    assert (9, 2, 9) not in found


def test_a_row_is_overwritten_and_the_last_of_equal_nodes_stays():
    matrix = RecycledTokens(16)
    matrix.learn(predictions((7, [9, 4, 3])))
    matrix.learn(predictions((7, [1, 2]), (5, [5]), (7, [6])))
    assert matrix.row(7) == [6]
    assert matrix.row(5) == [5]


def test_token_zero_is_a_token_and_minus_one_is_none():
    opened = source().open(ids(0))
    assert len(opened.propose(80)) == 0
    opened.learn(predictions((-1, [3]), (0, [0])))
    assert opened.propose(80).tokens.tolist() == [0] * 6
    assert opened.propose(80).parents.tolist() == [-1, 0, 1, 2, 3, 4]


def test_ids_beyond_the_vocabulary_get_rows_but_not_any_number():
    made = source(4)
    opened = made.open(ids(9))
    before = made.nbytes
    opened.learn(predictions((9, [1]), (2**30, [2])))
    assert opened.propose(1).tokens.tolist() == [1]
    assert made.nbytes == before // 4 * 10


def test_empty_prompt_no_predictions_and_budgets():
    made = source()
    opened = made.open(ids())
    opened.observe(ids())
    opened.learn(predictions())
    assert len(opened.propose(80)) == 0
    opened.learn(predictions((3, [1, 2])))
    opened.observe(ids(8, 3))
    assert opened.propose(1).tokens.tolist() == [1]
    assert len(opened.propose(0)) == 0


def test_more_than_eight_alternatives_are_cut():
    matrix = RecycledTokens(16)
    matrix.learn(predictions((1, list(range(12)))))
    assert matrix.row(1) == list(range(8))


def test_rows_outlive_requests():
    made = source()
    first = made.open(ids(7))
    first.learn(predictions((7, [9])))
    first.close()
    assert made.open(ids(7)).propose(5).tokens.tolist() == [9]
    assert source().open(ids(7)).propose(5).tokens.tolist() == []
