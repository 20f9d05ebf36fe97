"""The most frequent tokens against a plain counter."""

from __future__ import annotations

from collections import Counter

import numpy as np

from retrieval_draft.index.frequent import FADE, KEPT, FrequentTokens


def add(frequent: FrequentTokens, *tokens: int) -> None:
    frequent.add(np.array([tokens], np.int32), np.ones((1, len(tokens)), np.float32))


def test_docstring_example() -> None:
    frequent = FrequentTokens()
    frequent.add(np.array([[5, 7]], np.int32), np.array([[0.6, 0.3]], np.float32))
    frequent.add(np.array([[5, 9]], np.int32), np.array([[0.8, 0.1]], np.float32))
    np.testing.assert_allclose(frequent.counts[[5, 7, 9]], [1.4, 0.3, 0.1], rtol=1e-6)
    np.testing.assert_allclose(frequent.total[0], 1.8, rtol=1e-6)
    assert set(frequent.tokens[frequent.tokens >= 0].tolist()) == {5, 7, 9}


def test_what_is_kept_has_the_largest_counts_at_all_times() -> None:
    rng = np.random.default_rng(3)
    frequent, counter = FrequentTokens(), Counter[int]()
    for _ in range(60):
        tokens = (rng.zipf(1.3, 40) % 3000).astype(int).tolist()
        for token in tokens:
            add(frequent, token)
        counter.update(tokens)
        kept = frequent.tokens[frequent.tokens >= 0].tolist()
        assert len(set(kept)) == len(kept) == min(KEPT, len(counter))
        least = min(counter[token] for token in kept)
        assert all(count <= least for token, count in counter.items() if token not in kept)


def test_counts_fade_so_that_new_words_come_up() -> None:
    frequent = FrequentTokens()
    frequent.add(np.full((1, 1), 3, np.int32), np.full((1, 1), FADE + 1, np.float32))
    assert frequent.total[0] < FADE
    np.testing.assert_allclose(frequent.counts[3], (FADE + 1) / 2, rtol=1e-6)


def test_missing_tokens_and_token_zero() -> None:
    frequent = FrequentTokens()
    add(frequent, 0, -1)
    assert frequent.tokens[0] == 0
    assert frequent.total[0] == 1
    assert frequent.nbytes > 0
