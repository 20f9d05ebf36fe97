"""Hierarchy Drafting: guesses of the context, then of the model's outputs, then of a corpus."""

from __future__ import annotations

from collections import Counter
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.source import NodeLogits
from retrieval_draft.methods import hierarchy_drafting
from retrieval_draft.methods.hierarchy_drafting import COPIED, METHOD, WINDOW, ModelStore
from retrieval_draft.methods.method import MethodContext
from tests.support.tokens import finish, ids, method_source, paths


def source(*texts, vocabulary=200, **config):
    """One corpus of the texts given."""
    return method_source(METHOD, *([texts] if texts else []), vocabulary=vocabulary, **config)


def test_the_newest_guess_comes_first_and_equal_beginnings_are_one():
    proposal = source().open(ids(7, 1, 2, 3, 4, 7, 1, 2, 5, 6, 7)).propose(28)
    assert proposal.tokens.tolist() == [1, 2, 5, 6, 3, 4]
    assert proposal.parents.tolist() == [-1, 0, 1, 2, 1, 4]
    assert proposal.probs.tolist() == [1, 1, 0.5, 1, 0.5, 1]
    assert proposal.match_lengths.tolist() == [1] * 6
    assert proposal.level == "request"


def test_seven_guesses_the_least_recently_seen_goes():
    text = [token for first in range(10, 90, 10) for token in (7, *range(first, first + 4))]  # eight
    opened = source().open(ids(*text, 7))
    proposal = opened.propose(28)
    assert len(proposal) == 28
    assert proposal.tokens[::4].tolist() == [80, 70, 60, 50, 40, 30, 20]
    opened.observe(ids(20, 21, 22, 23, 7))  # seen again: the newest
    assert opened.propose(28).tokens[::4].tolist() == [20, 80, 70, 60, 50, 40, 30]


def test_a_guess_needs_four_tokens():
    opened = source().open(ids(7, 1, 2, 3, 7))
    assert opened.propose(28).tokens.tolist() == [1, 2, 3, 7]
    assert len(source().open(ids(7, 1, 2, 7)).propose(28)) == 0


def test_accepted_tokens_are_guesses_one_by_one():
    opened = source().open(ids(7))
    for token in (1, 2, 3, 4, 7):
        opened.observe(ids(token))
    assert opened.propose(28).tokens.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("prompt", [(), (3,), (1, 2, 3)])
def test_nothing_found(prompt):
    for made in (source(), source([9, 8, 7, 6, 5, 4])):
        assert len(made.open(ids(*prompt)).propose(28)) == 0
        assert len(made.open(ids(*prompt)).propose(0)) == 0


def test_a_budget_of_one_and_token_zero():
    assert source().open(ids(0, 0, 0, 0, 0, 5, 0)).propose(1).tokens.tolist() == [0]
    assert source().open(ids(0, 0, 0, 0, 0)).propose(28).tokens.tolist() == [0, 0, 0, 0]


def test_earlier_outputs_by_frequency_behind_the_context():
    made = source()
    finish(made, [7, 50, 51, 52, 53], [7, 1, 2, 3, 4])
    finish(made, [], [7, 5, 6, 7, 8])
    finish(made, [], [9, 7, 1, 2, 3, 4])
    proposal = made.open(ids(7)).propose(28)
    assert proposal.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # twice, once; prompts are not the model's
    assert proposal.level == "history"
    proposal = made.open(ids(7, 20, 21, 22, 23, 7)).propose(28)
    assert proposal.tokens[::4].tolist() == [20, 1, 5]
    assert proposal.level == "request"


def test_outputs_can_be_kept_out():
    made = source(history_replies=False)
    finish(made, [], [7, 1, 2, 3, 4])
    assert len(made.open(ids(7)).propose(28)) == 0


def test_of_equally_frequent_outputs_the_newest_is_first():
    made = source()
    for first in (10, 20, 30):
        finish(made, [], [7, *range(first, first + 4)])
    assert made.open(ids(7)).propose(28).tokens[::4].tolist() == [30, 20, 10]


def test_a_full_context_asks_nobody_else():
    made = source([50, 7, 1, 2, 3, 4])
    finish(made, [], [7, 5, 6, 7, 8])
    text = [token for first in range(100, 170, 10) for token in (7, *range(first, first + 4))]
    assert made.open(ids(*text, 50, 7)).propose(28).tokens[::4].tolist() == list(range(160, 90, -10))


def test_the_corpus_is_last():
    made = source([50, 7, 1, 2, 3, 4], [50, 7, 8, 2, 3, 4], [50, 7, 8, 2, 3, 4], [60, 7, 9, 2, 3, 4])
    proposal = made.open(ids(50, 7)).propose(28)
    assert proposal.tokens.tolist() == [8, 2, 3, 4, 1, 2, 3, 4]  # behind "50 7": twice, once
    assert proposal.match_lengths.tolist() == [2] * 8
    assert proposal.level == "corpus"
    finish(made, [], [7, 5, 6, 7, 8])
    proposal = made.open(ids(7, 20, 21, 22, 23, 50, 7)).propose(28)
    assert proposal.tokens[::4].tolist() == [20, 5, 8, 1]
    assert made.nbytes > 1


def test_replies_of_other_processes_come_between_the_model_and_the_corpus():
    def stored(*text):
        return SimpleNamespace(segments=(Segment.build([ids(*text)], 200),), nbytes=0, flush=lambda: None)

    stores = DraftStores(200, corpora=(stored(50, 7, 1, 2, 3, 4),), shared=stored(50, 7, 8, 2, 3, 4))
    (made,) = METHOD.sources(MethodContext(DraftConfig(), stores))
    proposal = made.open(ids(50, 7)).propose(28)
    assert proposal.tokens[::4].tolist() == [8, 1]
    assert proposal.level == "shared"
    finish(made, [], [7, 5, 6, 7, 8])
    assert made.open(ids(50, 7)).propose(28).tokens[::4].tolist() == [5, 8, 1]


def test_earlier_prompts_are_looked_up_like_a_corpus():
    made = source()
    finish(made, [50, 7, 1, 2, 3, 4], [9])
    made.flush()
    proposal = made.open(ids(50, 7)).propose(28)
    assert proposal.tokens.tolist() == [1, 2, 3, 4]
    assert proposal.level == "history"
    made.close()


def predictions(contexts, tokens):
    return NodeLogits(
        np.array(contexts, np.int32),
        np.array(tokens, np.int32)[:, None],
        np.ones((len(tokens), 1), np.float32),
    )


def test_the_window_takes_what_the_target_predicts_and_gives_guesses():
    opened = source().open(ids(*range(100)))
    drafted = paths(opened.propose(METHOD.nodes))
    assert len(drafted) == WINDOW * COPIED
    longest = max(drafted, key=len)
    assert len(longest) == WINDOW - 1 + COPIED
    columns = [path[-COPIED:] for path in drafted if not any(path == other[:-1] for other in drafted)]
    assert [column[0] for column in columns] == list(longest[:WINDOW])
    opened.observe(ids(150))
    opened.learn(predictions(columns, range(110, 110 + WINDOW)))
    moved = paths(opened.propose(METHOD.nodes))
    for length, (column, token) in enumerate(zip(columns, range(110, 110 + WINDOW), strict=True)):
        spine = tuple(other[1] for other in columns[:length])
        assert (*spine, *column[1:], token) in moved
    opened.observe(ids(columns[-1][0]))
    assert paths(opened.propose(4))[-1] == (*columns[-1][1:], 109 + WINDOW)


def test_the_window_moves_as_far_as_the_text_and_waits_where_it_was_not_verified():
    opened = source().open(ids(*range(100)))
    first = opened.propose(METHOD.nodes)
    opened.observe(ids(150))
    opened.learn(predictions([[1, 2, 3, 4]], [5]))
    assert opened.propose(METHOD.nodes).tokens.tolist() == first.tokens.tolist()
    drafted = paths(first)
    columns = [path[-COPIED:] for path in drafted if not any(path == other[:-1] for other in drafted)]
    opened.observe(ids(150, 151, 152))
    opened.learn(predictions(columns, range(110, 110 + WINDOW)))
    assert paths(opened.propose(METHOD.nodes))[COPIED - 1] == (*columns[2][1:], 112)
    assert len(opened.propose(28)) == 0


def test_a_guess_known_to_two_stores_is_one():
    made = source([50, 7, 1, 2, 3, 4])
    finish(made, [], [7, 1, 2, 3, 4])
    assert made.open(ids(7, 1, 2, 3, 4, 50, 7)).propose(28).tokens.tolist() == [1, 2, 3, 4]


def test_the_store_counts_as_brute_force_does():
    rng = np.random.default_rng(4)
    store, counts = ModelStore(), Counter()
    for _ in range(20):
        text = rng.integers(0, 3, 60).tolist()
        store.add(text)
        counts.update(tuple(text[at : at + 5]) for at in range(56))
    for token in range(3):
        most = sorted((count for gram, count in counts.items() if gram[0] == token), reverse=True)
        found = [counts[(token, *guess)] for guess in store.best(token)]
        assert found == most[:14]


def test_the_rarest_go(monkeypatch):
    monkeypatch.setattr(hierarchy_drafting, "MAX_STORED", 8)
    monkeypatch.setattr(hierarchy_drafting, "KEPT", 6)
    store = ModelStore()
    for first in (10, 10, 20, 30, 40, 50, 60, 70, 80):
        store.add([7, *range(first, first + 4)])
    assert len(store.best(7)) == 8
    store.add([7, 90, 91, 92, 93])
    assert [guess[0] for guess in store.best(7)] == [10, 90, 80, 70, 60, 50]
    assert store.nbytes == 6 * hierarchy_drafting.ENTRY_BYTES


def test_sessions_in_threads_share_the_store():
    made = source()

    def work(first):
        for _ in range(50):
            finish(made, [], [7, *range(first, first + 4)])
            made.open(ids(7)).propose(28)

    threads = [Thread(target=work, args=(first,)) for first in (10, 30, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made.open(ids(7)).propose(28).tokens[::4].tolist()) == [10, 30, 50]
