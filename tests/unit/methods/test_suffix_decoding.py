"""SuffixDecoding: the best-scored tree behind a suffix, from the request or from earlier outputs."""

from __future__ import annotations

from functools import partial
from heapq import heappop, heappush
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.suffix_automaton import SuffixAutomaton
from retrieval_draft.methods import suffix_decoding
from retrieval_draft.methods.method import MethodContext
from retrieval_draft.methods.suffix_decoding import METHOD, Replies, suffix_tree
from tests.support.tokens import finish, ids, method_source

source = partial(method_source, METHOD, vocabulary=100)


def test_as_many_nodes_as_tokens_match():
    proposal = source().open(ids(7, 8, 9, 4, 5, 7, 8)).propose(64)
    assert proposal.tokens.tolist() == [9, 4]
    assert proposal.parents.tolist() == [-1, 0]
    assert proposal.probs.tolist() == [0.5, 1]  # the text's own end is an occurrence that 9 did not follow
    assert proposal.match_lengths.tolist() == [2, 2]
    assert proposal.level == "request"


def test_a_tree_best_first_on_products():
    # Behind "1 2 3": 5 twice, 6 once, of 4 occurrences. Products 1/2, 1/4 (6), then 7 below 5 (1/4).
    text = [1, 2, 3, 5, 7, 1, 2, 3, 5, 8, 1, 2, 3, 6, 9, 1, 2, 3]
    proposal = source().open(ids(*text)).propose(64)
    assert proposal.tokens.tolist()[:2] == [5, 6]
    assert proposal.parents.tolist()[:2] == [-1, -1]
    assert proposal.probs.tolist()[:2] == [0.5, 0.25]
    assert len(proposal) == 3


def test_a_shorter_suffix_wins_with_a_larger_score():
    # "1 2" was followed by ten different tokens: the sum of 2 nodes is 2/11; "2" also by 5, twenty times:
    # one node with 20/31.
    text = [token for last in range(20, 30) for token in (1, 2, last)] + [3, 2, 5] * 20 + [1, 2]
    proposal = source().open(ids(*text)).propose(64)
    assert proposal.tokens.tolist() == [5]
    assert proposal.probs.tolist() == pytest.approx([20 / 31])
    assert proposal.match_lengths.tolist() == [1]


def test_products_below_a_tenth_stay_out():
    text = [token for last in range(20, 30) for token in (2, last)] + [2]  # each followed 1 of 11 times
    assert len(source().open(ids(*text)).propose(64)) == 0
    assert len(source().open(ids(*text[2:])).propose(64)) == 1  # 1 of 10


def test_match_and_draft_have_64_tokens_together():
    text = list(range(100))
    proposal = source().open(ids(*text, *text[:60])).propose(64)
    assert proposal.tokens.tolist() == text[60:92]  # 32 of the 60 tokens matched leave 32 to draft
    assert source().open(ids(*text, *text[:60])).propose(16).tokens.tolist() == text[60:76]


def test_earlier_outputs_are_drafted_and_prompts_are_not():
    made = source()
    finish(made, [1, 2, 3], [7, 8, 9, 0])
    proposal = made.open(ids(5, 7, 8)).propose(64)
    assert proposal.tokens.tolist() == [9, 0]
    assert proposal.probs.tolist() == [1, 1]
    assert proposal.level == "history"
    assert len(made.open(ids(5, 1, 2)).propose(64)) == 0


def test_the_larger_score_decides_and_ties_go_to_the_request():
    made = source()
    finish(made, [], [7, 8, 9])
    assert made.open(ids(8, 3, 8)).propose(64).tokens.tolist() == [9]  # 1 against 1/2
    finish(made, [], [8, 6])  # now 9 and 6 have 1/2 each
    proposal = made.open(ids(8, 3, 8)).propose(64)
    assert proposal.tokens.tolist() == [3]
    assert proposal.level == "request"


def test_outputs_do_not_continue_each_other():
    made = source()
    finish(made, [], [7, 8])
    finish(made, [], [9, 4])
    assert len(made.open(ids(7, 8)).propose(64)) == 0


@pytest.mark.parametrize("prompt", [(), (3,), (1, 2, 3)])
def test_nothing_found(prompt):
    assert len(source().open(ids(*prompt)).propose(64)) == 0
    assert len(source().open(ids(*prompt)).propose(0)) == 0


def test_a_budget_of_one_and_token_zero():
    assert source().open(ids(0, 5, 6, 0, 5)).propose(1).tokens.tolist() == [6]
    opened = source().open(ids(5, 0))
    opened.observe(ids(0, 0))
    assert opened.propose(64).tokens.tolist() == [0]
    opened.observe(ids(7, 0, 0))
    assert 7 in opened.propose(64).tokens.tolist()


def test_scores_equal_a_search_of_all_suffixes():
    """Every suffix on its own, counted in the texts themselves."""
    rng = np.random.default_rng(7)
    for _ in range(40):
        texts = [rng.integers(0, 3, 30).tolist() for _ in range(int(rng.integers(1, 5)))]
        end = rng.integers(0, 3, 20).tolist()
        automaton = SuffixAutomaton()
        for text in texts:
            automaton.insert(ids(*text))
            automaton.end_text()
        budget = int(rng.integers(1, 9))
        _, score = suffix_tree(automaton, end, budget, "history")
        assert score == pytest.approx(_best_score(texts, end, budget))


def _best_score(texts, end, budget):
    def count(tokens):
        size = len(tokens)
        return sum(text[at : at + size] == tokens for text in texts for at in range(len(text) - size + 1))

    best = 0.0
    for length in range(1, len(end) + 1):
        match = end[-length:]
        followed = sum(count([*match, token]) for token in range(3))
        heap, score, left = [], 0.0, min(budget, length)
        heappush(heap, (-1.0, match, followed))
        while heap and left >= 0:
            path, tokens, total = heappop(heap)
            if tokens is not match:
                score -= path
            left -= 1
            for token in range(3):
                taken = count([*tokens, token])
                if taken and -path * taken / total >= 0.1:
                    heappush(heap, (path * taken / total, [*tokens, token], taken))
        best = max(best, score)
    return best


def test_the_oldest_quarter_goes(monkeypatch):
    monkeypatch.setattr(suffix_decoding, "MAX_REPLIES", 8)
    replies = Replies(1 << 30)
    for number in range(9):
        replies.add(ids(50 + number, 7))
    found = [bool(replies.behind([50 + number], 4)[1]) for number in range(9)]
    assert found == [False] * 3 + [True] * 6


def test_bytes_are_bounded():
    replies = Replies(1 << 20)
    rng = np.random.default_rng(1)
    for _ in range(60):
        replies.add(rng.integers(0, 1000, 1000).astype(np.int32))
        assert replies.nbytes <= 1 << 20
    assert replies.nbytes > 1 << 19
    replies.add(rng.integers(0, 1000, 100_000).astype(np.int32))  # more than is allowed on its own
    assert replies.nbytes <= 1 << 20


def test_replies_can_be_kept_out():
    made = source(history_replies=False)
    finish(made, [], [7, 8, 9])
    assert len(made.open(ids(7, 8)).propose(64)) == 0


def test_sessions_in_threads_share_the_outputs():
    made = source()

    def work(first):
        for number in range(30):
            opened = made.open(ids(first, 90))
            opened.propose(64)
            opened.observe(ids(*range(first, first + 9), number))
            opened.close()

    threads = [Thread(target=work, args=(first,)) for first in (10, 30, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first in (10, 30, 50):
        assert made.open(ids(first, first + 1)).propose(64).tokens.tolist() == [first + 2, first + 3]


def test_stored_texts_have_a_tree_after_their_longest_match():
    def stored(*texts):
        return SimpleNamespace(segments=(Segment.build([ids(*text) for text in texts], 100),), nbytes=0)

    many = [[1, 2, 3, 4], [1, 2, 3, 4], *[[1, 2, 3, token] for token in range(20, 40)]]
    stores = DraftStores(100, corpora=(stored([7, 8, 9, 4, 5]),), shared=stored(*many))
    (made,) = METHOD.sources(MethodContext(DraftConfig(), stores))
    proposal = made.open(ids(7, 8)).propose(64)
    assert proposal.tokens.tolist() == [9, 4]  # as many as match
    assert proposal.level == "corpus"
    assert len(made.open(ids(1, 2, 3)).propose(64)) == 0  # 2 of 22 is less than a tenth
    assert made.open(ids(1, 2)).propose(64).tokens.tolist() == [3]
    opened = made.open(ids(7, 8, 60, 61, 7, 8))
    assert opened.propose(64).tokens.tolist() == [9, 4]  # the text's own end counts there, not here
    assert len(opened.propose(0)) == 0
