"""RACER: counted 10-grams below every matched suffix, then an adjacency tree."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.methods.lookup import GuessTree
from retrieval_draft.methods.method import MethodContext
from retrieval_draft.methods.racer import GRAM, METHOD, NODE_BYTES, GramTrie, breadths
from tests.support.tokens import ids, predictions_after


def source(vocabulary=64):
    (made,) = METHOD.sources(MethodContext(DraftConfig(), DraftStores(vocabulary)))
    return made


def grown(trie, text, most=64):
    tree = GuessTree("racer")
    trie.continuations(text, most, tree)
    return tree


def test_continuations_by_count():
    trie = GramTrie()
    for gram in ([7, 8, 9, 1], [7, 8, 9, 2], [7, 8, 5, 3], [8, 6, 6, 6]):
        trie.insert(gram)
    tree = grown(trie, [7, 8])
    # 9 twice; then the shallower 5, then the ends in the order of insertion; "8" alone is too short a suffix
    assert tree.tokens == [9, 5, 1, 2, 3]
    assert tree.parents == [-1, -1, 0, 0, 1]
    assert tree.lengths == [2, 2, 3, 3, 3]
    assert grown(trie, [7, 8], 2).tokens == [9, 5]


def test_every_suffix_is_found_and_equal_branches_merge():
    trie = GramTrie()
    trie.insert([1, 2, 3, 4, 5])
    trie.insert([2, 3, 4, 6])
    trie.insert([3, 4, 5, 7])
    tree = grown(trie, [9, 1, 2, 3])
    assert (tree.tokens, tree.parents) == ([4, 5, 6], [-1, 0, 0])
    tree = grown(trie, [1, 2, 3, 4])
    assert (tree.tokens, tree.parents) == ([5, 6, 7], [-1, -1, 0])
    assert tree.lengths == [4, 3, 3]


def brute_force(text, done):
    """Relative continuations of each suffix of 2 to 9 tokens in the complete 10-grams, with their counts."""
    counts = {}
    for start in range(done):
        gram = tuple(text[start : start + GRAM])
        for length in range(2, GRAM):
            if gram[:length] == tuple(text[-length:]):
                for end in range(length + 1, GRAM + 1):
                    key = (length, gram[length:end])
                    counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force_after_every_insertion(seed):
    random = np.random.default_rng(seed)
    text = random.integers(0, 3, 120).tolist()
    made = source()
    opened = made.open(ids(*text[:15]))
    for end in range(16, len(text) + 1):
        opened.observe(ids(text[end - 1]))
        counts = brute_force(text[:end], end - GRAM + 1)
        proposal = opened.propose(64)
        paths = []
        for token, parent in zip(proposal.tokens.tolist(), proposal.parents.tolist(), strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        best = sorted(counts.values(), reverse=True)[:64]
        taken = {path for (_, path), count in counts.items() if count > best[-1]} if best else set()
        assert taken <= set(paths)
        assert set(paths) <= {path for _, path in counts}
        if len(counts) <= 64:
            assert set(paths) == {path for _, path in counts}


def test_the_least_recently_used_leaves_are_evicted():
    trie = GramTrie(6)
    trie.insert([1, 2, 3])
    trie.insert([4, 5, 6])
    grown(trie, [1, 2])  # used: 1 and 2, not what follows
    trie.insert([7, 8])
    assert len(trie) == 6
    assert grown(trie, [1, 2]).tokens == []  # 3 went first
    assert grown(trie, [4, 5]).tokens == []  # then 6
    assert grown(trie, [7]).tokens == []
    trie.insert([1, 2, 9])
    assert grown(trie, [1, 2]).tokens == [9]
    for token in range(100):
        trie.insert([token, token + 1, token + 2])
    assert len(trie) == 6


def test_breadths():
    assert breadths(8, 0) == [4, 2, 1, 1, 1, 1, 1, 1]
    assert breadths(4, 1) == [4, 2, 1, 1]
    assert breadths(4, 2) == [2, 1, 1, 1]
    assert breadths(1, 3) == [1]


def test_what_is_left_goes_to_the_adjacency_tree():
    opened = source().open(ids(5))
    opened.learn(predictions_after(5, 6, 7, 8))
    opened.learn(predictions_after(6, 1, 2, 3, 4, 9))
    opened.learn(predictions_after(7, 1, 2, 3))
    opened.learn(predictions_after(1, 0))
    proposal = opened.propose(64)
    # breadths: 6 has 4 children, 7 has 2, 8 one; 1 has 4 and 2, of which its row fills one
    assert proposal.tokens.tolist() == [6, 7, 8, 1, 2, 3, 4, 1, 2, 0, 0]
    assert proposal.parents.tolist() == [-1, -1, -1, 0, 0, 0, 0, 1, 1, 3, 7]
    assert opened.propose(1).tokens.tolist() == [6]
    opened.learn(predictions_after(5, 5))
    assert len(opened.propose(100)) == 64


def test_trie_first_then_matrix_and_equal_tokens_merge():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2]
    opened = source().open(ids(*text))
    opened.learn(predictions_after(2, 11, 3))
    proposal = opened.propose(64)
    assert proposal.tokens.tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert proposal.parents.tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, -1]


def test_only_complete_ten_grams_count():
    opened = source().open(ids(1, 2, 3, 4, 5, 1, 2))
    assert len(opened.propose(64)) == 0


def test_token_zero_and_the_empty_prompt():
    opened = source().open(ids())
    opened.observe(ids())
    assert len(opened.propose(64)) == 0
    opened.observe(ids(*[0] * 11))
    assert opened.propose(64).tokens.tolist() == [0] * 8


def test_trie_and_matrix_outlive_requests():
    made = source()
    empty = made.nbytes
    first = made.open(ids(*range(1, 12)))
    first.learn(predictions_after(3, 0))
    first.close()
    assert made.nbytes == empty + 20 * NODE_BYTES
    assert made.open(ids(2, 3)).propose(64).tokens.tolist() == [*range(4, 12), 0]
