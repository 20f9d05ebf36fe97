"""ANPD: a chain of most frequent next tokens, the highest level that knows the context first."""

from __future__ import annotations

import pytest

from retrieval_draft.methods.anpd import METHOD
from tests.support.tokens import ids


def source():
    (made,) = METHOD.sources(None)
    return made


def session(*prompt):
    return source().open(ids(*prompt))


def test_the_worked_example():
    proposal = session(7, 8, 9, 7, 8, 4, 7, 8, 4, 5, 8).propose(60)
    assert proposal.tokens.tolist() == [4, 7, 8, 4, 7, 8, 4, 7, 8, 4]
    assert proposal.parents.tolist() == list(range(-1, 9))
    assert proposal.match_lengths.tolist() == [1] + [2] * 9
    # after "8" 4 twice and 9 once, after "8 4" 7 and 5, after "4 7" only 8
    assert proposal.probs[:3].tolist() == pytest.approx([2 / 3, 1 / 2, 1])


def test_two_tokens_decide_before_one():
    # after "1" came 5 twice, but after "2 1" 6
    assert session(1, 5, 1, 5, 2, 1, 6, 2, 1).propose(1).tokens.tolist() == [6]
    # nothing followed "9 1": one token decides
    assert session(1, 5, 1, 5, 2, 1, 6, 9, 1).propose(1).tokens.tolist() == [5]


def test_the_most_frequent_wins_and_accepted_tokens_count():
    opened = session(1, 2, 1, 3, 1)
    assert opened.propose(1).tokens.tolist() == [2]
    opened.observe(ids(3, 9, 1))
    assert opened.propose(1).tokens.tolist() == [3]
    opened.observe(ids(2, 8, 1))
    assert opened.propose(1).tokens.tolist() == [3]


def test_what_a_prediction_leads_to_is_not_counted():
    opened = session(1, 2, 1, 2, 1)
    assert opened.propose(60).tokens.tolist() == [2, 1] * 5
    assert opened.propose(60).probs.tolist() == [1.0] * 10


def test_nothing_known_empty_prompt_and_token_zero():
    assert len(session(1, 2, 3).propose(60)) == 0
    opened = session()
    opened.observe(ids())
    assert len(opened.propose(60)) == 0
    opened.observe(ids(0))
    assert len(opened.propose(60)) == 0
    opened.observe(ids(0))
    assert opened.propose(60).tokens.tolist() == [0] * 10
    assert len(opened.propose(0)) == 0


def test_requests_start_from_their_own_prompt():
    made = source()
    first = made.open(ids(1, 2, 1))
    assert first.propose(1).tokens.tolist() == [2]
    first.close()
    assert len(made.open(ids(1)).propose(60)) == 0
    assert made.nbytes == 0
