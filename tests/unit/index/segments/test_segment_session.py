"""Tests of lookups in segments for a growing text."""

import numpy as np
import pytest

from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.segments.segment_session import SegmentSession


def session(segments: list[Segment], prompt: list[int]) -> SegmentSession:
    held = tuple(segments)
    return SegmentSession(lambda: held, np.array(prompt, np.int32), "corpus", "corpus")


def segment(*runs: list[int], vocabulary: int = 100) -> Segment:
    return Segment.build([np.array(run, np.int32) for run in runs], vocabulary)


def test_worked_example() -> None:
    proposal = session([segment([7, 8, 9, 4])], [5, 7, 8]).propose(2)
    assert proposal.tokens.tolist() == [9, 4]
    assert proposal.parents.tolist() == [-1, 0]
    assert proposal.match_lengths.tolist() == [2, 3]
    assert (proposal.source, proposal.level) == ("corpus", "corpus")


def test_nothing_known_nothing_proposed() -> None:
    assert len(session([], [1, 2]).propose(8)) == 0
    assert len(session([segment([7, 8, 9])], [50, 51]).propose(8)) == 0
    assert len(session([segment([7, 8, 9])], [7, 8, 9]).propose(8)) == 0  # the text ends there
    assert len(session([segment([7, 8, 9])], [7]).propose(0)) == 0


def test_drafts_stop_at_the_end_of_a_text() -> None:
    proposal = session([segment([1, 2, 3], [4, 5, 6])], [1]).propose(60)
    assert proposal.tokens.tolist() == [2, 3]


def test_ids_of_another_width_are_not_found() -> None:
    assert len(session([segment([1, 2, 3])], [100]).propose(4)) == 0  # the separator's value
    assert len(session([segment([1, 2, 3])], [70000, 2]).propose(4)) == 1


def test_the_more_frequent_comes_first() -> None:
    proposal = session([segment([1, 2, 5], [1, 2, 6], [1, 2, 6], [9, 2, 7])], [1, 2]).propose(3)
    assert proposal.tokens.tolist()[:2] == [6, 5]
    assert 7 in session([segment([1, 2, 5], [9, 2, 7])], [1, 2]).propose(3).tokens  # a shorter context adds


def test_counts_of_several_segments_are_added() -> None:
    one, two = segment([1, 2, 5], [1, 2, 6]), segment([1, 2, 6])
    both = session([one, two], [1, 2]).propose(2)
    together = session([segment([1, 2, 5], [1, 2, 6], [1, 2, 6])], [1, 2]).propose(2)
    assert both.tokens.tolist() == together.tokens.tolist() == [6, 5]
    assert both.probs == pytest.approx(together.probs)


def test_step_by_step_equals_at_once() -> None:
    random = np.random.default_rng(3)
    runs = [random.integers(0, 5, 200).tolist() for _ in range(6)]
    segments = [segment(*runs[:3]), segment(*runs[3:], vocabulary=80000)]
    text = random.integers(0, 5, 120).tolist()
    grown = session(segments, text[:1])
    position = 1
    while position < len(text):
        step = int(random.integers(1, 6))
        grown.observe(np.array(text[position : position + step], np.int32))
        position += step
        fresh = session(segments, text[: min(position, len(text))])
        mine, theirs = grown.propose(20), fresh.propose(20)
        assert mine.tokens.tolist() == theirs.tokens.tolist()
        assert mine.parents.tolist() == theirs.parents.tolist()
        assert mine.probs.tolist() == theirs.probs.tolist()
        assert grown.match_length == fresh.match_length


def test_trees_are_prefix_closed_with_distinct_siblings() -> None:
    random = np.random.default_rng(4)
    held = segment(*[random.integers(0, 4, 300).tolist() for _ in range(4)])
    for budget in (1, 7, 60, 200):
        proposal = session([held], random.integers(0, 4, 40).tolist()).propose(budget)
        assert 0 < len(proposal) <= budget
        assert all(parent < node for node, parent in enumerate(proposal.parents))
        pairs = set(zip(proposal.parents.tolist(), proposal.tokens.tolist(), strict=True))
        assert len(pairs) == len(proposal)
        assert ((proposal.probs > 0) & (proposal.probs < 1)).all()


def test_new_segments_are_taken_up_in_the_middle_of_a_request() -> None:
    held = [(segment([1, 2, 3]),)]
    mine = SegmentSession(lambda: held[-1], np.array([7, 8], np.int32), "history", "history")
    assert len(mine.propose(4)) == 0
    held.append((*held[-1], segment([7, 8, 9])))
    assert mine.propose(4).tokens.tolist() == [9]
    mine.observe(np.array([9, 1], np.int32))
    assert mine.propose(4).tokens.tolist() == [2, 3]
    held.append(held[-1][1:])  # the oldest is gone
    assert len(mine.propose(4)) == 0


def test_a_long_match_proposes_deep() -> None:
    run = [*range(90), 3, 1, 4]
    proposal = session([segment(run)], run[:40]).propose(60)
    assert len(proposal) >= 16
    assert proposal.tokens.tolist() == run[40 : 40 + len(proposal)]
    assert proposal.match_lengths[0] == 32  # as far as contexts are told apart
