"""Prompt lookup: the left-most earlier occurrence of the longest of the last three n-grams."""

from __future__ import annotations

import numpy as np

from retrieval_draft.methods.registry import get_method


def session(*prompt):
    (source,) = get_method("prompt_lookup").sources(None)
    return source.open(np.array(prompt, np.int32))


def test_copies_what_followed_the_first_occurrence():
    proposal = session(7, 8, 9, 4, 7, 8).propose(10)
    assert proposal.tokens.tolist() == [9, 4, 7, 8]
    assert proposal.parents.tolist() == [-1, 0, 1, 2]


def test_the_left_most_occurrence_wins_and_ten_tokens_are_copied():
    proposal = session(5, 1, *range(20, 40), 5, 2, 5).propose(60)
    assert proposal.tokens.tolist() == [1, *range(20, 29)]


def test_longer_matches_go_first_and_the_budget_cuts():
    opened = session(8, 1, 7, 8, 2, 3, 7)
    opened.observe(np.array([8], np.int32))
    assert opened.propose(1).tokens.tolist() == [2]


def test_new_text_proposes_nothing():
    assert len(session(1, 2, 3).propose(10)) == 0
