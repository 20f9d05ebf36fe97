"""SAM-Decoding alone: a chain from the request's text or a tree from a corpus, whichever matches longer."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from retrieval_draft.methods.sam_decoding import METHOD
from tests.support.tokens import ids, method_source

source = partial(method_source, METHOD, vocabulary=200)


def chain(proposal):
    assert proposal.parents.tolist() == list(range(-1, len(proposal) - 1))
    return proposal.tokens.tolist()


def test_a_match_of_one_token_drafts_five():
    proposal = source().open(ids(8, *range(20, 40), 8)).propose(60)
    assert chain(proposal) == [20, 21, 22, 23, 24]
    assert proposal.match_lengths.tolist() == [1] * 5
    assert proposal.level == "request"


def test_four_more_for_each_token_up_to_sixty():
    text = list(range(100, 180))
    assert len(source().open(ids(*text, 5, *text[:3])).propose(60)) == 13
    assert len(source().open(ids(*text, 5, *text[:14])).propose(60)) == 57
    assert len(source().open(ids(*text, 5, *text[:15])).propose(60)) == 60
    assert len(source().open(ids(*text, 5, *text[:19])).propose(100)) == 60


def test_the_longest_match_and_its_oldest_occurrence():
    opened = source().open(ids(7, 8, 1, 6, 7, 8, 2, 6, 7, 8))
    assert chain(opened.propose(60)) == [2, 6, 7, 8]  # "6 7 8" beats the older "7 8"
    opened = source().open(ids(7, 8, 1, 5, 7, 8, 2, 4, 7, 8))
    assert chain(opened.propose(60))[:3] == [1, 5, 7]  # "7 8" twice: the older


def test_the_oldest_occurrence_of_every_match_of_a_growing_text():
    rng = np.random.default_rng(5)
    text = rng.integers(0, 4, 300).tolist()
    opened, done = source().open(ids(*text[:3])), 3
    while done < len(text):
        proposal = opened.propose(60)
        sizes = [
            size
            for size in range(1, done)
            if any(text[end - size : end] == text[done - size : done] for end in range(size, done))
        ]
        expected: list[int] = []
        if sizes:
            size = max(sizes)
            end = next(e for e in range(size, done) if text[e - size : e] == text[done - size : done])
            expected = text[end : min(end + 1 + 4 * size, done)]
        assert chain(proposal) == expected
        step = int(rng.integers(1, 4))
        opened.observe(ids(*text[done : done + step]))
        done += step


def test_a_match_that_goes_on_elsewhere_is_searched_again():
    opened = source().open(ids(7, 8, 1, 5, 7, 8, 2, 4, 7, 8))
    opened.propose(60)
    opened.observe(ids(2))
    assert chain(opened.propose(60)) == [4, 7, 8, 2]


@pytest.mark.parametrize("prompt", [(), (3,), (1, 2, 3)])
def test_new_text_drafts_nothing(prompt):
    assert len(source().open(ids(*prompt)).propose(60)) == 0
    assert len(source([[9, 9, 9]]).open(ids(*prompt)).propose(60)) == 0


def test_token_zero_and_a_budget_of_one():
    opened = source().open(ids(0, 5, 0))
    assert chain(opened.propose(1)) == [5]
    opened.observe(ids(5, 0, 0, 0))
    assert chain(opened.propose(60)) == [0]  # "0 0" once before, one token behind it
    assert len(opened.propose(0)) == 0


def test_bytes_of_two_neighbours_are_no_token():
    """1 is 01 00 00 00; the bytes of 0x0100 0x0000 hold it one byte further on."""
    opened = source(vocabulary=70000).open(ids(0x0100, 0, 3, 1, 9, 1))
    assert chain(opened.propose(60)) == [9, 1]


SIX = [11, 12, 13, 14, 15, 16]


def test_a_corpus_match_must_be_longer_by_more_than_five():
    sam = source([[*SIX, 20, 21, 22, 23, 24, 25]])
    assert chain(sam.open(ids(*SIX)).propose(60)) == [20, 21, 22, 23, 24]  # 6 - 5 = 1: five nodes
    assert len(sam.open(ids(*SIX[1:])).propose(60)) == 0


def test_ties_go_to_the_text():
    sam = source([[*SIX, 20, 21]])
    assert sam.open(ids(16, 30, *SIX)).propose(60).level == "request"  # one token against 6 - 5
    proposal = sam.open(ids(17, 30, *SIX)).propose(60)
    assert proposal.level == "corpus"
    assert proposal.match_lengths.tolist() == [6, 6]


def test_the_corpus_tree_is_grown_best_first_by_counts():
    # 30 three times of four, 30 31 twice (1/2), 30 32 and 40 once (1/4): five nodes, the fifth is below 31.
    sam = source([[*SIX, 30, 31, 50], [*SIX, 30, 31, 50]], [[*SIX, 30, 32], [*SIX, 40, 41]])
    proposal = sam.open(ids(*SIX)).propose(60)
    assert proposal.tokens.tolist() == [30, 31, 50, 40, 32]
    assert proposal.parents.tolist() == [-1, 0, 1, -1, 0]
    assert proposal.probs.tolist() == pytest.approx([3 / 4, 2 / 3, 1, 1 / 4, 1 / 3])
    assert sam.open(ids(*SIX)).propose(2).tokens.tolist() == [30, 31]


def test_a_node_has_eight_children_at_most():
    text = list(range(100, 110))
    sam = source([[*text, token] for token in range(20, 40)])
    assert sam.open(ids(*text)).propose(60).tokens.tolist() == list(range(20, 28))


def test_earlier_requests_are_static_texts():
    sam = source()
    first = sam.open(ids(1, 2, 3, 4, 5, 6))
    first.observe(ids(7))
    first.close()
    sam.flush()
    assert len(sam.open(ids(2, 3, 4, 5, 6)).propose(60)) == 0  # five tokens of bias
    proposal = sam.open(ids(1, 2, 3, 4, 5, 6)).propose(60)
    assert proposal.tokens.tolist() == [7]
    assert proposal.level == "history"
    assert sam.nbytes > 0
    sam.close()
