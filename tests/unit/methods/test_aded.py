"""ADED: sentences of a tree search over a trigram matrix that gains what the text repeats."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.methods.aded import METHOD, ROW_BYTES, AdedSession, TrigramMatrix, _Node
from retrieval_draft.methods.method import MethodContext
from tests.support.tokens import ids, paths


def source(*corpora):
    (made,) = METHOD.sources(MethodContext(DraftConfig(), DraftStores(64, corpora=corpora)))
    return made


def values(row):
    return {token: pytest.approx(value) for token, value in row}


def test_remembered_requests_are_shares_and_gains_come_on_top():
    matrix = TrigramMatrix()
    assert matrix.row(7, 8) == []
    for gram in ([7, 8, 5], [7, 8, 9], [7, 8, 9]):
        matrix.remember(gram)
    assert values(matrix.row(7, 8)) == {9: 2 / 3, 5: 1 / 3}
    matrix.gain([7, 8, 5])
    assert values(matrix.row(7, 8)) == {9: 2 / 3, 5: 1 / 3 + 0.04}
    for _ in range(100):
        matrix.gain([7, 8, 5])
    assert matrix.row(7, 8)[0] == (5, 3.0)


def test_rows_come_from_the_corpus_and_twelve_are_kept():
    texts = [ids(1, 2, token) for token in range(20) for _ in range(1 + (token < 12))]
    matrix = TrigramMatrix([Segment.build(texts, 64), Segment.build([ids(1, 2, 3), ids(1, 2)], 64)])
    row = matrix.row(1, 2)
    assert row[0] == (3, pytest.approx(3 / 33))
    assert {token for token, _ in row} == set(range(12))
    assert matrix.row(5, 5) == []
    matrix.remember([1, 2, 40])
    matrix.gain([1, 2, 41])
    assert len(matrix.row(1, 2)) == 12
    assert values(matrix.row(1, 2))[41] == pytest.approx(0.04)


def test_the_score_of_a_way():
    node = _Node([(9, 0.75), (5, 0.25)])
    assert node.choose() == 0  # no visits yet: all scores are 0
    node.visits, node.wins = [6, 1], [0.0, 0.0]
    scale = (32 + math.log(16 / 8)) * math.sqrt(7)
    assert scale * 0.75 / 7 < scale * 0.25 / 2
    assert node.choose() == 1
    node.visits = [4, 1]  # .75 / 5 against .25 / 2
    assert node.choose() == 0
    node.visits, node.wins = [5, 1], [0.0, 0.0]
    assert node.choose() == 0  # equal: the first
    node.wins = [0.0, 0.1]
    assert node.choose() == 1


def worked():
    texts = [[7, 8, 9]] * 3 + [[7, 8, 5]] + [[8, 9, 1], [8, 5, 2], [9, 1, 3]]
    return TrigramMatrix([Segment.build([ids(*text) for text in texts], 64)])


def test_the_worked_example():
    opened = AdedSession(worked(), ids(7, 8))
    proposal = opened.propose(64)
    assert proposal.tokens.tolist() == [9, 1, 3, 5, 2]
    assert proposal.parents.tolist() == [-1, 0, 1, -1, 3]
    shares = proposal.probs.tolist()
    assert shares[0] == pytest.approx(0.75, abs=0.03)  # visits follow the values
    assert shares[0] + shares[3] == pytest.approx(1)
    assert opened.propose(1).tokens.tolist() == [9]


def test_sentences_of_four_and_one_argmax_token():
    matrix = TrigramMatrix([Segment.build([ids(*range(10, 30))], 64)])
    assert AdedSession(matrix, ids(10, 11)).propose(64).tokens.tolist() == [12, 13, 14, 15, 16]


def test_at_most_24_sentences_and_64_nodes():
    random = np.random.default_rng(0)
    matrix = TrigramMatrix([Segment.build([random.integers(0, 12, 5000).astype(np.int32)], 64)])
    proposal = AdedSession(matrix, ids(3, 4)).propose(100)
    assert len(proposal) == 64
    found = paths(proposal)
    assert len(set(found)) == 64
    leaves = [path for path in found if not any(longer[:-1] == path for longer in found)]
    assert len(leaves) <= 24
    assert max(map(len, found)) <= 5


def test_the_last_sixteen_tokens_gain_at_each_step():
    made = source()
    opened = made.open(ids(*range(20)))
    assert made.nbytes == 0
    opened.observe(ids(20))
    assert made.nbytes == 14 * ROW_BYTES  # 5 .. 20
    opened.observe(ids(30))
    opened.observe(ids(18, 19))
    proposal = opened.propose(64)
    # 18 19 20 was in all three windows; then 19 20 30 in two, and so on to the text's end and around
    assert proposal.tokens.tolist() == [20, 30, 18, 19, 20]


def test_empty_and_short_prompts_and_token_zero():
    made = source()
    opened = made.open(ids())
    opened.observe(ids())
    assert len(opened.propose(64)) == 0
    opened.observe(ids(0))
    assert len(opened.propose(64)) == 0
    opened.observe(ids(0, 0))
    assert opened.propose(64).tokens.tolist() == [0] * 5


def test_what_requests_said_is_kept_for_later_ones():
    made = source()
    first = made.open(ids(1, 2, 3, 4))
    first.observe(ids(5))
    first.close()
    assert made.open(ids(1, 2)).propose(64).tokens.tolist() == [3, 4, 5]
    assert made.nbytes == 3 * ROW_BYTES


def test_with_a_corpus_requests_are_not_kept():
    corpus = SimpleNamespace(segments=[Segment.build([ids(1, 2, 9)], 64)])
    made = source(corpus)
    made.open(ids(1, 2, 3, 4)).close()
    assert made.open(ids(1, 2)).propose(64).tokens.tolist() == [9]


def test_the_shared_store_is_counted_where_this_process_knows_nothing():
    shared = SimpleNamespace(segments=[Segment.build([ids(1, 2, 9), ids(5, 6, 7)], 64)], nbytes=0)
    (made,) = METHOD.sources(MethodContext(DraftConfig(), DraftStores(64, shared=shared)))
    made.open(ids(1, 2, 3)).close()
    assert made.open(ids(1, 2)).propose(64).tokens.tolist() == [3]
    assert made.open(ids(5, 6)).propose(64).tokens.tolist() == [7]


def test_pairs_are_counted_again_when_the_store_has_grown_and_keep_their_gains():
    """A request opened earlier sees what came meanwhile, too: all share the newest texts."""
    shared = SimpleNamespace(segments=[Segment.build([ids(1, 2, 9)], 64)], nbytes=0)
    (made,) = METHOD.sources(MethodContext(DraftConfig(), DraftStores(64, shared=shared)))
    early = made.open(ids(1, 2))
    assert early.propose(64).tokens.tolist() == [9]
    assert len(made.open(ids(5, 6)).propose(64)) == 0
    shared.segments = [Segment.build([ids(1, 2, 9), *[ids(1, 2, 8)] * 3, ids(5, 6, 7)], 64)]
    assert made.open(ids(5, 6)).propose(64).tokens.tolist() == [7]
    for opened in (made.open(ids(1, 2)), early):
        assert opened.propose(2).tokens.tolist() == [8, 9]

    matrix = TrigramMatrix(shared.segments)
    matrix.gain([1, 2, 9])
    assert values(matrix.row(1, 2)) == {8: 0.75, 9: 0.29}
    matrix.renew([Segment.build([*[ids(1, 2, 9)] * 3, ids(1, 2, 4)], 64)])
    assert values(matrix.row(1, 2)) == {9: 0.79, 4: 0.25}
    matrix.renew(())
    assert values(matrix.row(1, 2)) == {9: 0.04}


def test_a_little_more_text_counts_only_the_pairs_that_were_not_there():
    text = [ids(1, 2, 9)] * 40
    matrix = TrigramMatrix([Segment.build(text, 64)])
    assert matrix.row(1, 2) == [(9, 1.0)]
    assert matrix.row(5, 6) == []
    matrix.renew([Segment.build([*text, ids(1, 2, 4)], 64), Segment.build([ids(5, 6, 7)], 64)])
    assert matrix.row(1, 2) == [(9, 1.0)]
    assert matrix.row(5, 6) == [(7, 1.0)]


def test_the_least_recently_used_pairs_make_room():
    matrix = TrigramMatrix(rows=3)
    matrix.remember([1, 2, 3, 4, 5])
    matrix.row(1, 2)
    matrix.remember([7, 8, 9])
    assert len(matrix) == 3
    assert [token for token, _ in matrix.row(1, 2)] == [3]
    assert matrix.row(2, 3) == []
