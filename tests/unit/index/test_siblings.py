"""Samples of one prompt draft from each other, and texts that grow in turns are counted right."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from retrieval_draft.index.siblings import SiblingSource
from retrieval_draft.index.source import TokenArray
from retrieval_draft.index.suffix_automaton import SuffixAutomaton


def tokens(*values: int) -> TokenArray:
    return np.array(values, np.int32)


def test_a_sibling_is_offered_what_another_said() -> None:
    one, other = SiblingSource().open_parallel(tokens(1, 2), (), 2)
    one.observe(tokens(3, 4, 5))
    other.observe(tokens(3))
    proposal = other.propose(4)
    assert (proposal.tokens[0], proposal.parents[0], proposal.source) == (4, -1, "siblings")
    assert proposal.tokens.tolist()[:2] == [4, 5]
    assert 5 not in one.propose(4).tokens.tolist()[:1], "nothing has followed its own end"


def test_the_first_tokens_of_a_reply_have_the_prompt_before_them() -> None:
    one, other = SiblingSource().open_parallel(np.arange(100, dtype=np.int32), (), 2)
    one.observe(tokens(7))
    proposal = other.propose(1)
    assert proposal.tokens.tolist() == [7]
    assert proposal.match_lengths[0] == 32


def test_a_request_alone_proposes_nothing() -> None:
    session = SiblingSource().open(tokens(1, 2, 1))
    session.observe(tokens(2))
    assert len(session.propose(8)) == 0


def test_siblings_that_end_leave_their_text_to_the_others() -> None:
    one, other = SiblingSource().open_parallel(tokens(1), (), 2)
    one.observe(tokens(2, 3))
    one.close()
    other.observe(tokens(2))
    assert other.propose(1).tokens.tolist() == [3]


@pytest.mark.parametrize("seed", range(20))
def test_texts_that_grow_in_turns_equal_counting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    automaton = SuffixAutomaton(16)
    begin = rng.integers(0, 3, int(rng.integers(0, 6))).tolist()
    automaton.insert(np.array(begin, np.int32))
    texts = [list(begin) for _ in range(4)]
    states = [automaton.state] * 4
    followed: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for end, token in enumerate(begin):
        for start in range(end + 1):
            followed[tuple(begin[start:end])][token] += 1
    for _ in range(50):
        turn = int(rng.integers(0, 4))
        added = rng.integers(0, 3, int(rng.integers(1, 4))).tolist()
        automaton.state = states[turn]
        automaton.insert(np.array(added, np.int32))
        states[turn] = automaton.state
        for token in added:
            text = texts[turn]
            for start in range(len(text) + 1):
                followed[tuple(text[start:])][token] += 1
            text.append(token)
    for context, counts in followed.items():
        if len(context) <= 6:
            assert automaton.followers(np.array(context, np.int32)) == dict(counts), context
    assert automaton.num_states < 2 * len(automaton)
