"""SSSD: the request's continuations and the datastore's, one tree of the most probable nodes."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from retrieval_draft.methods.sssd import BACKOFF, METHOD, OWN, SEARCHED, SHORTER
from tests.support.tokens import ids, method_source, paths

source = partial(method_source, METHOD, vocabulary=200)


def path_probs(proposal):
    found = {}
    for path, prob in zip(paths(proposal), proposal.probs.tolist(), strict=True):
        found[path] = found.get(path[:-1], 1.0) * prob
    return found


def test_the_request_and_the_datastore_are_weighed():
    proposal = source([[7, 8, 5]]).open(ids(7, 8, 9, 7, 8)).propose(60)
    found = path_probs(proposal)
    assert found[(9,)] == pytest.approx(OWN / (1 + BACKOFF), rel=1e-5)
    assert found[(5,)] == pytest.approx(1 - OWN, rel=1e-5)
    assert paths(proposal)[0] == max(found, key=found.get)
    assert proposal.level == "request"


def test_either_alone_has_all_the_weight():
    proposal = source([[7, 8, 5]]).open(ids(7, 8)).propose(60)
    assert path_probs(proposal) == {(5,): 1.0}
    assert proposal.level == "corpus"
    found = path_probs(source().open(ids(7, 8, 9, 7, 8)).propose(60))
    assert found[(9,)] == pytest.approx(1 / (1 + BACKOFF), rel=1e-5)


def test_what_both_say_comes_first():
    opened = source([[7, 8, 9], [7, 8, 5], [7, 8, 5]]).open(ids(7, 8, 9, 1, 7, 8, 6, 7, 8))
    assert paths(opened.propose(1)) == [(9,)]


def test_longer_ends_of_the_text_weigh_more():
    opened = source([[1, 7, 8, 5], [2, 7, 8, 6]]).open(ids(1, 7, 8))
    found = path_probs(opened.propose(60))
    assert found == pytest.approx({(5,): 1 - SHORTER / 2, (6,): SHORTER / 2}, rel=1e-5)


def test_four_tokens_are_enough():
    corpus = [[1, 2, 3, 4, 5], [9, 2, 3, 4, 5, 20], [8, 2, 3, 4, 5, 20], [1, 2, 3, 4, 5, 21]]
    assert paths(source(corpus).open(ids(1, 2, 3, 4, 5)).propose(60))[0] == (20,)


@pytest.mark.parametrize(("nodes", "branch"), [(4, 4), (5, 5), (7, 5), (8, 6), (31, 6), (47, 8), (60, 10)])
def test_branches_are_as_long_as_published(nodes, branch):
    opened = source([list(range(100))]).open(ids(10, 11))
    assert opened.propose(nodes).tokens.tolist() == list(range(12, 12 + branch))


def test_occurrences_are_taken_at_equal_distances():
    many = [[7, 8, 20]] * SEARCHED + [[7, 8, 30]] * SEARCHED  # 20 sorts before 30
    found = path_probs(source(many).open(ids(7, 8)).propose(60))
    assert found == pytest.approx({(20,): 0.5, (30,): 0.5})
    apart = path_probs(source(many[:150], many[150:]).open(ids(7, 8)).propose(60))
    assert apart == pytest.approx({(20,): 0.5, (30,): 0.5}, abs=0.01)


def test_parents_come_before_their_children_and_chances_fall():
    rng = np.random.default_rng(0)
    opened = source([rng.integers(0, 3, 50).tolist() for _ in range(20)]).open(ids(*rng.integers(0, 3, 80)))
    proposal = opened.propose(60)
    assert len(proposal) == 60
    assert len(set(paths(proposal))) == 60
    chances = list(path_probs(proposal).values())
    assert chances == sorted(chances, reverse=True) or np.diff(chances).max() < 1e-6
    assert chances[0] <= 1


def test_finished_requests_join_the_datastore():
    made = source()
    first = made.open(ids(1, 2))
    first.observe(ids(7, 8, 9, 0))
    first.close()
    made.flush()
    proposal = made.open(ids(5, 7, 8)).propose(60)
    assert paths(proposal) == [(9,), (9, 0)]
    assert proposal.level == "history"
    assert made.nbytes > 0
    made.close()


def test_observed_tokens_and_references_are_looked_up():
    opened = source().open(ids(1, 2), [ids(7, 8, 9)])
    assert len(opened.propose(60)) == 0
    opened.observe(ids(7, 8))
    assert paths(opened.propose(1)) == [(9,)]
    opened.observe(ids(0, 0, 0))
    assert paths(opened.propose(1)) == [(0,)]


@pytest.mark.parametrize("prompt", [(), (1,), (90, 91)])
def test_nothing_found(prompt):
    opened = source([[7, 8, 9]]).open(ids(*prompt))
    assert len(opened.propose(60)) == len(opened.propose(0)) == 0
