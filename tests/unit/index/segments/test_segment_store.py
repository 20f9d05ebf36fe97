"""Tests of segments that are merged and evicted."""

import threading

import numpy as np
import pytest

from retrieval_draft.index.segments import segment_store as segment_pile
from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.segments.segment_store import SegmentStore


def of(tokens: int, first: int = 1) -> Segment:
    return Segment.build([np.full(tokens, first, np.int32)], 100)


def sizes(pile: SegmentStore) -> list[int]:
    return [segment.num_tokens for segment in pile.segments]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([100, 20, 4, 2], [126]),
        ([200, 20, 4, 2], [200, 26]),
        ([5], [5]),
        ([], []),
        ([40, 5], [40, 5]),
        ([1, 1, 1, 40], [43]),
    ],
)
def test_the_newest_are_merged_by_size(before, after) -> None:
    pile = SegmentStore(100, 1 << 20)
    for tokens in before:
        pile.add(of(tokens))
    while pile.compact():
        pass
    assert sizes(pile) == after
    assert pile.num_tokens == sum(before)


def test_a_caller_in_a_hurry_joins_few_tokens() -> None:
    pile = SegmentStore(100, 1 << 20)
    for tokens in (100, 20, 4, 2):
        pile.add(of(tokens))
    assert pile.compact(most_tokens=30)
    assert sizes(pile) == [100, 26]
    assert not pile.compact(most_tokens=30)


def test_what_is_being_merged_is_left_to_whoever_merges(monkeypatch) -> None:
    pile = SegmentStore(100, 1 << 20)
    for tokens in (30, 20):
        pile.add(of(tokens))
    inside, go_on = threading.Event(), threading.Event()
    join = segment_pile.join_segments

    def slow(segments, vocabulary):
        if len(segments) == 2 and segments[0].num_tokens == 30:
            inside.set()
            assert go_on.wait(10)
        return join(segments, vocabulary)

    monkeypatch.setattr(segment_pile, "join_segments", slow)
    merging = threading.Thread(target=pile.compact)
    merging.start()
    assert inside.wait(10)
    for tokens in (3, 2):
        pile.add(of(tokens))
    assert pile.compact(most_tokens=1000)  # only the two that came after
    assert sizes(pile) == [30, 20, 5]
    go_on.set()
    merging.join()
    assert sizes(pile) == [50, 5]


def test_the_oldest_go_when_there_is_too_much() -> None:
    pile = SegmentStore(100, 1 << 20)
    pile.add(of(70_000))
    pile.add(of(60_000))
    while pile.compact():
        pass
    pile.max_bytes = pile.nbytes - 1
    assert pile.compact()
    assert sizes(pile) == [60_000]
    assert pile.evicted == 70_000
    assert not pile.compact()  # the last one stays


def test_memory_is_given_back_a_while_later(monkeypatch) -> None:
    monkeypatch.setattr(segment_pile, "GRACE", 0.0)
    pile = SegmentStore(100, 1 << 20)
    for _ in range(2):
        pile.add(of(10))
    assert pile.compact()
    assert pile._leaving
    pile.free_retired()
    assert not pile._leaving


def test_two_threads_that_tend_it_lose_and_double_nothing() -> None:
    pile = SegmentStore(100, 1 << 30)
    done = threading.Event()

    def merge() -> None:
        while not done.is_set():
            pile.compact()

    merger = threading.Thread(target=merge)
    merger.start()
    for number in range(3000):
        pile.add(of(2 + number % 7))
        pile.compact(most_tokens=64)
    done.set()
    merger.join(30)
    assert not merger.is_alive()
    assert pile.num_tokens == sum(2 + number % 7 for number in range(3000))
    assert not pile._claimed
