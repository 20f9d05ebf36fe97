"""Tests of what tells which entries of a server have come."""

from hypothesis import given
from hypothesis import strategies as st

from retrieval_draft.index.store import sequence_set
from retrieval_draft.index.store.sequence_set import SequenceSet


@given(st.lists(st.integers(0, 60)))
def test_every_number_is_new_once(numbers) -> None:
    found, known = SequenceSet(), set()
    for number in numbers:
        assert (number in found) == (number in known)
        assert found.add(number) == (number not in known)
        known.add(number)
        assert len(found) == len(known)
    firsts, lasts = found.bounds[::2], found.bounds[1::2]
    assert {
        number for pair in zip(firsts, lasts, strict=True) for number in range(pair[0], pair[1] + 1)
    } == known
    assert all(first > last + 1 for first, last in zip(firsts[1:], lasts, strict=False))  # as few as can be
    assert SequenceSet(found.bounds).bounds == found.bounds


@given(st.lists(st.integers(0, 2**63 - 1), max_size=60))
def test_few_gaps_are_kept_and_nothing_is_new_twice(numbers) -> None:
    most, sequence_set.MAX_GAPS = sequence_set.MAX_GAPS, 4
    try:
        found = SequenceSet()
        new = [number for number in numbers if found.add(number)]
        assert len(set(new)) == len(new)
        assert all(number in found for number in numbers)
        assert len(found.bounds) <= 10
    finally:
        sequence_set.MAX_GAPS = most


def test_the_lowest_gap_is_closed_first(monkeypatch) -> None:
    monkeypatch.setattr(sequence_set, "MAX_GAPS", 2)
    found = SequenceSet()
    for number in (10, 20, 30, 40):
        found.add(number)
    assert found.bounds == [10, 20, 30, 30, 40, 40]
    assert not found.add(15)
    assert found.add(35)
    assert found.bounds == [10, 30, 35, 35, 40, 40]


def test_what_comes_long_after_those_behind_it_is_new() -> None:
    found = SequenceSet()
    assert all(found.add(number) for number in range(100))
    assert all(found.add(number) for number in range(50_000, 100_000))
    assert all(found.add(number) for number in range(100, 50_000))
    assert found.bounds == [0, 99_999]
