"""A copy continues near the position where an edit left it."""

from __future__ import annotations

import numpy as np

from retrieval_draft.index.alignment import AlignmentSession, AlignmentSource
from retrieval_draft.index.source import TokenArray

OLD = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]


def session(*text: int) -> AlignmentSession:
    return AlignmentSource().open(np.array([*OLD, *text], np.int32))


def chains(opened: AlignmentSession, budget: int = 8) -> list[list[int]]:
    """The proposal's paths from root to leaf."""
    proposal = opened.propose(budget)
    found: list[list[int]] = []
    for token, parent in zip(proposal.tokens.tolist(), proposal.parents.tolist(), strict=True):
        if parent < 0:
            found.append([])
        found[-1].append(token)
    return found


def test_a_copy_continues() -> None:
    opened = session(1, 10, 11, 12, 13)
    assert chains(opened, 3) == [[14, 15, 16]]
    assert opened.propose(3).match_lengths.tolist() == [4, 5, 6]
    assert opened.propose(3).source == "alignment"


def test_after_a_replaced_token_it_continues_with_the_next_one() -> None:
    opened = session(1, 10, 11, 12, 13, 99)
    assert chains(opened, 3) == [[15, 16, 17]]
    assert opened.propose(3).match_lengths.tolist() == [0, 1, 2]


def test_equal_tokens_near_the_position_come_first() -> None:
    opened = session(1, 10, 11, 12, 13, 99, 17)
    assert chains(opened, 4) == [[18, 19], [16, 17]]


def test_fewer_tokens_than_an_n_gram_are_no_copy() -> None:
    assert chains(session(1, 10, 11, 12)) == []
    assert chains(AlignmentSession(np.empty(0, np.int32))) == []


def test_a_copy_that_was_left_long_ago_is_forgotten() -> None:
    assert chains(session(1, 10, 11, 12, 13, *range(100, 124)))
    assert chains(session(1, 10, 11, 12, 13, *range(100, 125))) == []


def test_references_are_copied_and_nothing_continues_across_their_end() -> None:
    prompt = np.array([1, 16, 17, 18, 19], np.int32)
    assert chains(AlignmentSession(prompt, [np.array(OLD, np.int32)])) == []
    longer: TokenArray = np.array([*OLD, 20], np.int32)
    assert chains(AlignmentSession(prompt, [longer])) == [[20]]
    across = np.array([19, 1, 16, 17, 19, 1, 16, 17], np.int32)
    assert chains(AlignmentSession(across[4:], [across[:1], across[1:4]])) == []


def test_token_by_token_is_the_same_as_at_once() -> None:
    rng = np.random.default_rng(0)
    old = rng.integers(0, 50, 200)
    edited = np.delete(old, rng.integers(0, 200, 12))
    edited[rng.integers(0, len(edited), 12)] = 51
    text = np.concatenate((old, edited)).astype(np.int32)
    slow = AlignmentSession(text[:200])
    for end in range(201, len(text)):
        slow.observe(text[end - 1 : end])
        fast = AlignmentSession(text[:end])
        for budget in (1, 7):
            one, other = slow.propose(budget), fast.propose(budget)
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.parents.tolist() == other.parents.tolist()
            roots = one.tokens[one.parents < 0]
            assert len(set(roots.tolist())) == len(roots), "siblings hold different tokens"
            assert len(one) <= budget
