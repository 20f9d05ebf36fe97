"""Property tests: segments against naive twins."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_draft.index.segments.segment import Segment
from retrieval_draft.index.segments.segment_session import SegmentSession
from retrieval_draft.index.segments.suffix_sort import sort_suffixes

DEPTH = 96
runs = st.lists(
    st.lists(st.integers(0, 3), max_size=40) | st.lists(st.sampled_from([0, 1, 299, 70000]), max_size=40),
    max_size=6,
)


def naive_order(tokens: np.ndarray, separator: int) -> list[int]:
    """Positions by the text from there to its end, separator included; by position where that is equal."""

    def key(position: int) -> tuple[list[int], int]:
        tail = tokens[position : position + DEPTH].tolist()
        end = tail.index(separator) + 1 if separator in tail else len(tail)
        return tail[:end], position

    return sorted((position for position in range(len(tokens)) if tokens[position] != separator), key=key)


def naive_count(texts: list[list[int]], context: list[int]) -> int:
    size = len(context)
    return sum(
        text[position : position + size] == context
        for text in texts
        for position in range(len(text) - size + 1)
    )


@settings(max_examples=150, deadline=None)
@given(runs, st.integers(1, 3))
def test_order_equals_the_naive_one(texts: list[list[int]], threads: int) -> None:
    vocabulary = 70001 if any(70000 in text for text in texts) else 300
    segment = Segment.build([np.array(text, np.int32) for text in texts], vocabulary)
    assert segment.suffixes.tolist() == naive_order(segment.tokens, segment.separator)
    again = sort_suffixes(segment.tokens, segment.separator, segment.bits, threads)
    assert again.tolist() == segment.suffixes.tolist()


@settings(max_examples=150, deadline=None)
@given(runs, st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_counts_equal_the_naive_ones(texts: list[list[int]], context: list[int]) -> None:
    segment = Segment.build([np.array(text, np.int32) for text in texts], 70001)
    for size in range(1, len(context) + 1):
        tail = context[-size:]
        assert segment.count(np.array(tail, np.int32)) == naive_count(texts, tail)


@settings(max_examples=100, deadline=None)
@given(runs, runs, st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_every_draft_was_seen_after_the_text(
    older: list[list[int]], newer: list[list[int]], text: list[int]
) -> None:
    segments = tuple(
        Segment.build([np.array(run, np.int32) for run in part], 70001) for part in (older, newer)
    )
    session = SegmentSession(lambda: segments, np.array(text, np.int32), "corpus", "corpus")
    proposal = session.propose(30)
    known = older + newer
    longest = max(
        (size for size in range(1, len(text) + 1) if naive_count([run[:-1] for run in known], text[-size:])),
        default=0,
    )
    assert (len(proposal) > 0) == (longest > 0)
    paths: list[list[int]] = []
    for node, parent in enumerate(proposal.parents):
        path = ([] if parent < 0 else paths[parent]) + [int(proposal.tokens[node])]
        paths.append(path)
        used = int(proposal.match_lengths[node]) - len(path) + 1
        assert 1 <= used <= longest
        assert naive_count(known, text[-used:] + path)
