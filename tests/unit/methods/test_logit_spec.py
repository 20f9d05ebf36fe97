"""LogitSpec: a copied branch, then one for each token that the last logits ranked."""

from __future__ import annotations

import numpy as np

from retrieval_draft.index.source import NodeLogits
from retrieval_draft.methods.logit_spec import METHOD
from tests.support.tokens import ids


def session(*prompt):
    (source,) = METHOD.sources(None)
    return source.open(ids(*prompt))


def predictions(*rows):
    """Rows of (context, ranking), rankings of equal length."""
    contexts = np.array([[*[-1] * (4 - len(context)), *context] for context, _ in rows], np.int32)
    ranking = np.array([ranking for _, ranking in rows], np.int32)
    return NodeLogits(contexts, ranking, np.full(ranking.shape, 0.1, np.float32))


def branches(proposal):
    """Paths to the leaves, in the order of their leaves."""
    paths = []
    for token, parent in zip(proposal.tokens.tolist(), proposal.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    inner = set(proposal.parents.tolist())
    return [path for node, path in enumerate(paths) if node not in inner]


def test_the_worked_example():
    opened = session(7, 8, 9, 4, 7)
    assert branches(opened.propose(64)) == [(8, 9, 4, 7)]
    opened.learn(predictions(([7, 8, 9, 4], [7, 8, 4])))
    proposal = opened.propose(64)
    assert branches(proposal) == [(8, 9, 4, 7), (4, 7)]
    assert proposal.match_lengths.tolist() == [1, 1, 1, 1, 0, 1]


def test_the_longest_n_gram_and_the_guess_count_as_text():
    # "5 1 2" goes on with 3, "1 2" last with 6
    assert branches(session(5, 1, 2, 3, 1, 2, 6, 5, 1, 2).propose(1)) == [(3,)]
    opened = session(9, 2, 6, 5, 1, 8, 5, 1, 2, 3, 5, 1)
    opened.learn(predictions(([1, 2, 3, 5], [1, 2])))
    # "2" alone was first followed by 6, "5 1 2" by 3
    assert branches(opened.propose(64)) == [(8, 5, 1, 2, 3, 5, 1), (2, 3, 5, 1)]


def test_lengths_by_rank():
    unseen = list(range(100, 164))
    text = [token for guess in unseen for token in (guess, 1, 2, 3, 4, 5)]
    opened = session(*text, 50, 99)
    context = [4, 5, 50]
    opened.learn(NodeLogits(ids(*[3, *context])[None], ids(99, *unseen[:63])[None], np.full((1, 64), 0.01)))
    lengths = [len(path) for path in branches(opened.propose(64))]
    # 8 * 4 + 10 * 3 = 62 nodes, then 2 of the 3 of rank 19
    assert lengths == [4] * 8 + [3] * 10 + [2]


def test_ranks_behind_32_are_single_tokens():
    opened = session(50, 99)
    opened.learn(predictions(([50], [99, *range(100, 163)])))
    proposal = opened.propose(100)
    assert proposal.tokens.tolist() == list(range(100, 163))
    assert proposal.parents.tolist() == [-1] * 63
    assert opened.propose(1).tokens.tolist() == [100]


def test_the_rows_of_other_nodes_are_not_read():
    opened = session(1, 2, 3)
    opened.learn(predictions(([-1, 1, 2, 3], [8, 9]), ([1, 2, 3, 8], [4, 5]), ([1, 2, 3, 6], [7, 7])))
    opened.observe(ids(8, 4))
    assert opened.propose(64).tokens.tolist() == [5]
    opened.observe(ids(3))
    assert opened.propose(64).tokens.tolist() == [8, 4, 3]  # "3" was followed by 8 4 3; nothing ranked


def test_of_equal_contexts_the_one_that_chose_the_last_token():
    opened = session(5, 5, 5, 5)
    opened.learn(predictions(([5, 5, 5, 5], [5, 1]), ([5, 5, 5, 5], [6, 2]), ([5, 5, 5, 5], [5, 3])))
    opened.observe(ids(5, 5, 6))
    assert opened.propose(64).tokens.tolist() == [2]


def test_a_later_full_continuation_overrides_and_an_earlier_longer_one_stays():
    opened = session(1, *range(100, 120), 1, *range(200, 219), 1)
    assert opened.propose(1).tokens.tolist() == [200]  # 19 tokens and the new 1 behind the later one: 20
    opened = session(1, *range(100, 120), 1, *range(200, 210), 1)
    assert opened.propose(1).tokens.tolist() == [100]
    opened.observe(ids(*range(300, 309), 1))
    assert opened.propose(64).tokens.tolist() == [*range(200, 210), 1, *range(300, 309)]
    assert session(1, 3, 4, 1, 5, 1).propose(64).tokens.tolist() == [3, 4, 1, 5, 1]


def test_learning_before_and_after_the_text_moves_on_is_the_same():
    first, second = session(1, 2), session(1, 2)
    logits = predictions(([1, 2], [0, 3]), ([1, 2, 0], [4, 0]))
    first.learn(logits)
    first.observe(ids(0, 4))
    second.observe(ids(0, 4))
    second.learn(logits)
    assert first.propose(64).tokens.tolist() == second.propose(64).tokens.tolist() == [0, 4]


def test_empty_prompt_and_minus_one():
    opened = session()
    assert len(opened.propose(64)) == 0
    opened.observe(ids())
    opened.observe(ids(0))
    opened.learn(predictions(([], [0, -1])))
    assert len(opened.propose(64)) == 0
