"""Property tests: lookups of many rows side by side against `segment_match.advance`, a text at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_draft.drafting.batch._kernels import segment_rows
from retrieval_draft.drafting.batch._kernels.slots import LENGTH, LOCATED, SLOT_FIELDS, TEXT
from retrieval_draft.index._kernels import segment_match
from retrieval_draft.index.segments.segment import Segment

LONGEST = segment_match.LONGEST


def _texts(vocabulary: int, least: int, most: int):
    ids = st.integers(0, min(vocabulary, 4) - 1) | st.integers(0, vocabulary + 2)
    text = st.lists(ids, min_size=least, max_size=40) | st.lists(st.just(0), min_size=least, max_size=60)
    return st.lists(text, min_size=1, max_size=most)


@st.composite
def _cases(draw):
    vocabulary = draw(st.sampled_from([4, 200, 40000, 262144]))
    inside = [
        [token for token in text if token < vocabulary] or [0] for text in draw(_texts(vocabulary, 1, 6))
    ]
    long = draw(st.booleans())  # several sampled keys, and intervals that reach over them
    segments = [
        Segment.build([np.array(text * (40 if long else 1), np.int32)], vocabulary) for text in inside
    ]
    rows = []
    for text in draw(_texts(vocabulary, 1, 5)):
        cuts = sorted(draw(st.lists(st.integers(1, len(text)), max_size=3)))
        rows.append((np.array(text, np.int32), [*cuts, len(text)]))
    return segments, rows


def _state(rows: int, segments: int):
    chain = np.zeros((rows, segments, LONGEST + 1, 2), np.int32)
    return chain, np.zeros((rows, segments), np.int32), np.full((rows, LONGEST), -1, np.int32)


@given(_cases())
@settings(max_examples=150, deadline=None)
def test_rows_side_by_side_find_what_advance_finds(case):
    segments, rows = case
    table = np.stack([segment.row for segment in segments])
    chain, longest, tail = _state(len(rows), len(segments))
    other_chain, other_longest, other_tail = _state(len(rows), len(segments))
    slots = np.zeros((len(rows), SLOT_FIELDS), np.int64)
    for row, (text, _) in enumerate(rows):
        slots[row, TEXT] = text.ctypes.data
    ids = np.arange(len(rows))
    for step in range(4):
        for row, (text, cuts) in enumerate(rows):
            before, now = slots[row, LENGTH], cuts[min(step, len(cuts) - 1)]
            slots[row, LENGTH] = now
            segment_match.advance(
                table, other_chain[row], other_longest[row], other_tail[row], text[before:now]
            )
        segment_rows.advance_rows(ids, 0, len(rows), slots, table, chain, longest, tail)
        assert (slots[:, LOCATED] == slots[:, LENGTH]).all()
        assert longest.tolist() == other_longest.tolist()
        assert tail.tolist() == other_tail.tolist()
        for row in range(len(rows)):
            for segment in range(len(segments)):
                for length in range(1, LONGEST + 1):
                    here = (segment, length)
                    views = [(chain, longest, tail), (other_chain, other_longest, other_tail)]
                    found = []
                    for a, b, c in views:
                        count = segment_match.occurrences(table, segment, a[row], b[row], c[row], length)
                        found.append((count, a[row][here].tolist() if count else None))
                    assert found[0] == found[1]


def test_a_worked_example():
    text = np.array([1, 2, 3, 1, 2, 4], np.int32)
    segment = Segment.build([text], 200)  # keys of 8 tokens: only shorter ends occur
    chain, longest, tail = _state(1, 1)
    slots = np.zeros((1, SLOT_FIELDS), np.int64)
    end = np.array([9, 1, 2], np.int32)
    slots[0, TEXT], slots[0, LENGTH] = end.ctypes.data, len(end)
    segment_rows.advance_rows(np.arange(1), 0, 1, slots, segment.row[None], chain, longest, tail)
    assert chain[0, 0, 1, 1] - chain[0, 0, 1, 0] == 2  # [2] occurs twice
    assert chain[0, 0, 2, 1] - chain[0, 0, 2, 0] == 2  # and so does [1, 2]
    assert chain[0, 0, 3].tolist() == [0, 0]  # [9, 1, 2] does not
    assert tail[0, -3:].tolist() == [9, 1, 2]
