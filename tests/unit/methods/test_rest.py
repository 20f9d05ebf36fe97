"""REST: the continuations of the longest suffix found, counted, cut as published, in one tree."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest

from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.methods.rest import CHOICES, METHOD, TextEnd, common_prefixes
from tests.support.tokens import ids, method_source, paths

source = partial(method_source, METHOD, vocabulary=100)


def test_continuations_are_counted_and_merged():
    proposal = source([[7, 8, 9, 4], [7, 8, 9, 3], [7, 8, 5]]).open(ids(1, 7, 8)).propose(64)
    assert paths(proposal) == [(9,), (5,), (9, 3), (9, 4)]  # 2, 1, 1, 1: the shorter first
    assert proposal.probs.tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 2, 1 / 2])
    assert proposal.match_lengths.tolist() == [2] * 4
    assert proposal.level == "corpus"


def test_the_longest_suffix_found_is_the_only_one_used():
    rest = source([[1, 7, 8, 2], [7, 8, 9], [7, 8, 9]])
    assert paths(rest.open(ids(5, 1, 7, 8)).propose(64)) == [(2,)]
    assert paths(rest.open(ids(5, 7, 8)).propose(64)) == [(9,), (2,)]


def test_sixteen_tokens_are_enough():
    text = list(range(20, 50))
    proposal = source([[*text[-20:], 1], [5, *text[-16:], 2], [*text[-15:], 3]]).open(ids(*text)).propose(64)
    assert paths(proposal) == [(1,), (2,)]
    assert proposal.match_lengths.tolist() == [16, 16]


def test_one_token_is_not_looked_up():
    assert len(source([[7, 8, 9]]).open(ids(3, 8)).propose(64)) == 0


def test_a_match_at_the_end_of_a_text_makes_way_for_a_shorter_one():
    assert paths(source([[5, 7, 8], [7, 8, 9]]).open(ids(5, 7, 8)).propose(64)) == [(9,)]


def test_ten_tokens_of_one_match():
    rest = source([[1, 2, *range(20, 40)]])
    assert rest.open(ids(1, 2)).propose(64).tokens.tolist() == list(range(20, 30))  # lengths 1..10: 55


def test_the_cut_drops_the_longest_prefixes_first():
    """Two chains of ten: their 20 prefixes have lengths of 110 together; 10 + 10 + 9 + 9 go, then 8."""
    rest = source([[1, 2, *range(20, 40)], [1, 2, *range(50, 70)]])
    found = paths(rest.open(ids(1, 2)).propose(64))
    assert len(found) == 15
    assert sum(map(len, found)) == 64
    assert found[-1] == tuple(range(20, 28))


def test_sixty_four_prefixes_by_count():
    """70 single tokens: 64 of them fill the tree."""
    rest = source([[1, 2, token] for token in range(20, 90)] + [[1, 2, 89]])
    found = paths(rest.open(ids(1, 2)).propose(64))
    assert len(found) == CHOICES
    assert found[:3] == [(89,), (20,), (21,)]


def test_segments_are_counted_together():
    apart = source([[7, 8, 9, 4], [7, 8, 0]], [[7, 8, 9, 4], [7, 8, 0, 1]], [[7, 8, 9]])
    together = source([[7, 8, 9, 4], [7, 8, 0], [7, 8, 9, 4], [7, 8, 0, 1], [7, 8, 9]])
    first, second = (rest.open(ids(7, 8)).propose(64) for rest in (apart, together))
    assert paths(first) == paths(second) == [(9,), (0,), (9, 4), (0, 1)]
    assert first.probs.tolist() == second.probs.tolist()


def test_token_zero_is_found_and_drafted():
    assert paths(source([[0, 0, 0, 5]]).open(ids(0, 0, 0)).propose(64)) == [(5,)]
    assert paths(source([[0, 0, 0, 5]]).open(ids(6, 0, 0)).propose(64)) == [(0,), (5,), (0, 5)]


@pytest.mark.parametrize("prompt", [(), (1,), (90, 91, 92)])
def test_nothing_found(prompt):
    rest = source([[7, 8, 9]])
    assert len(rest.open(ids(*prompt)).propose(64)) == 0
    assert len(rest.open(ids(*prompt)).propose(0)) == 0


def test_a_small_budget_keeps_the_most_frequent():
    rest = source([[7, 8, 9, 4], [7, 8, 9, 3], [7, 8, 5]])
    assert paths(rest.open(ids(7, 8)).propose(1)) == [(9,)]


def test_observed_tokens_move_on():
    opened = source([[7, 8, 9, 4]]).open(ids(7))
    opened.observe(ids(8))
    assert paths(opened.propose(64)) == [(9,), (9, 4)]
    opened.observe(ids(9))
    assert paths(opened.propose(64)) == [(4,)]
    opened.observe(ids(6))
    assert len(opened.propose(64)) == 0


def test_prefixes_equal_brute_force():
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 4, 60).tolist() for _ in range(30)]
    segments = tuple(Segment.build([ids(*text) for text in half], 4) for half in (texts[:20], texts[20:]))
    end = TextEnd(segments, ids(1, 2, 0))
    for span in (1, 2, 3):
        suffix = [1, 2, 0][-span:]
        expected: Counter = Counter()
        for text in texts:
            for start in range(span, len(text)):
                if text[start - span : start] == suffix:
                    expected.update(
                        tuple(text[start:stop]) for stop in range(start + 1, min(start + 5, 60) + 1)
                    )
        assert dict(common_prefixes(end.behind(span), 5, 1 << 20)) == expected


def test_without_corpora_it_learns_from_earlier_requests():
    rest = source()
    first = rest.open(ids(1, 7))
    assert len(first.propose(64)) == 0
    first.observe(ids(8, 9, 0))
    first.close()
    rest.flush()
    proposal = rest.open(ids(5, 7, 8)).propose(64)
    assert paths(proposal) == [(9,), (9, 0)]
    assert proposal.level == rest.level == "history"
    assert rest.nbytes > 0
    rest.close()
