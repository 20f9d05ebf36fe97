"""Brings the segment lookups of many rows to the ends of their texts, side by side.

A binary search waits for memory at every step. Those of all rows, segments and lengths advance together here:
each round makes one step of each of them, so that their waits overlap. Their results are those of
`segment_match.find_short`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import inner_kernel, kernel
from retrieval_draft._kernels.memory import load_int32, load_uint64
from retrieval_draft._kernels.views import int32_row, prefetch
from retrieval_draft.drafting.batch._kernels.slots import LENGTH, LOCATED, SLOT_MASK, TEXT
from retrieval_draft.index._kernels.segment_match import (
    BITS,
    LONGEST,
    NUM_SAMPLES,
    SAMPLES,
    SEPARATOR,
    SIZE,
    SUFFIXES,
    TOKENS,
    UNKNOWN,
    WIDTH,
    advance,
    enter,
    prefix_at,
)
from retrieval_draft.index._kernels.sizes import STRIDE

SHORT = 3
"""Lengths below that of a key which are looked up with it: `segment_tree.gather` reads these first."""

TOGETHER = 512
"""Approximate number of lookups that advance together."""

SEGMENT, TOKENS_ASKED, SHIFT, FIRST, LAST, POSITION = range(6)
QUERY_FIELDS = 6


@inner_kernel
def _halve(
    queries: NDArray[np.int64], prefixes: NDArray[np.uint64], query: int, key: int, above: bool
) -> bool:
    """One step of a query's binary search, by the key in the middle. Returns whether another step follows."""
    first, last = queries[query, FIRST], queries[query, LAST]
    middle = (first + last) >> 1
    right = key < prefixes[query] or (above and key == prefixes[query])
    first = middle + 1 if right else first
    last = last if right else middle
    queries[query, FIRST] = first
    queries[query, LAST] = last
    return bool(first < last)


@kernel
def _search_samples(
    segments: NDArray[np.int64],
    queries: NDArray[np.int64],
    prefixes: NDArray[np.uint64],
    count: int,
    above: bool,
) -> None:
    """Narrows FIRST..LAST of each query to the first sample whose key is at least its prefix, or above it."""
    again = True
    while again:
        again = False
        for query in range(count):
            first, last = queries[query, FIRST], queries[query, LAST]
            if first < last:
                samples = segments[queries[query, SEGMENT], SAMPLES]
                key = load_uint64(samples, (first + last) >> 1) >> np.uint64(queries[query, SHIFT])
                again |= _halve(queries, prefixes, query, key, above)


@kernel
def _search_suffixes(
    segments: NDArray[np.int64],
    queries: NDArray[np.int64],
    prefixes: NDArray[np.uint64],
    count: int,
    above: bool,
) -> None:
    """The same among the suffixes."""
    again = True
    while again:
        again = False
        for query in range(count):
            first, last = queries[query, FIRST], queries[query, LAST]
            if first < last:
                segment = queries[query, SEGMENT]
                position = load_int32(segments[segment, SUFFIXES], (first + last) >> 1)
                queries[query, POSITION] = position
                prefetch(segments[segment, TOKENS] + segments[segment, WIDTH] * position)
        for query in range(count):
            if queries[query, FIRST] < queries[query, LAST]:
                key = prefix_at(
                    segments, queries[query, SEGMENT], queries[query, POSITION], queries[query, TOKENS_ASKED]
                )
                again |= _halve(queries, prefixes, query, key, above)


@kernel
def find_together(
    segments: NDArray[np.int64],
    queries: NDArray[np.int64],
    prefixes: NDArray[np.uint64],
    low: NDArray[np.int64],
    entries: NDArray[np.int32],
    count: int,
) -> None:
    """Looks prefixes up, each in one segment.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        queries: int64, shape (queries, QUERY_FIELDS). SEGMENT, TOKENS_ASKED and SHIFT are given: tokens of
            the prefix, and bits of a key after it. The rest is scratch.
            low: int64, shape (queries,). Scratch.
        prefixes: uint64, shape (queries,). Tokens packed as the upper bits of a key are.
        entries: int32, shape (queries, 2). Written: entries of a chain, see `segment_match`.
        count: Queries.
    """
    for query in range(count):
        queries[query, FIRST] = 0
        queries[query, LAST] = segments[queries[query, SEGMENT], NUM_SAMPLES]
    _search_samples(segments, queries, prefixes, count, False)
    for query in range(count):
        sample = queries[query, FIRST]
        low[query] = sample
        queries[query, FIRST] = max((sample - 1) * STRIDE + 1, 0)
        queries[query, LAST] = min(sample * STRIDE, segments[queries[query, SEGMENT], SIZE])
    _search_suffixes(segments, queries, prefixes, count, False)
    # The end of an interval follows its beginning; there is none where the beginning has another prefix.
    for query in range(count):
        segment = queries[query, SEGMENT]
        shift = np.uint64(queries[query, SHIFT])
        sample, begin = low[query], queries[query, FIRST]
        low[query] = begin
        queries[query, FIRST] = queries[query, LAST] = sample
        found = False
        if begin < segments[segment, SIZE]:
            position = load_int32(segments[segment, SUFFIXES], begin)
            found = prefix_at(segments, segment, position, queries[query, TOKENS_ASKED]) == prefixes[query]
        if not found:
            low[query] = -1
        elif (
            sample < segments[segment, NUM_SAMPLES]
            and load_uint64(segments[segment, SAMPLES], sample) >> shift == prefixes[query]
        ):
            queries[query, FIRST] = sample + 1
            queries[query, LAST] = segments[segment, NUM_SAMPLES]
    _search_samples(segments, queries, prefixes, count, True)
    for query in range(count):
        sample = queries[query, FIRST]
        if low[query] >= 0:
            queries[query, FIRST] = max((sample - 1) * STRIDE + 1, low[query] + 1)
            queries[query, LAST] = min(sample * STRIDE, segments[queries[query, SEGMENT], SIZE])
        else:
            queries[query, LAST] = queries[query, FIRST]
    _search_suffixes(segments, queries, prefixes, count, True)
    for query in range(count):
        begin, end = low[query], queries[query, FIRST]
        if begin < 0:
            entries[query, 0] = 0
            entries[query, 1] = 0
        else:
            enter(segments, queries[query, SEGMENT], entries[query], begin, end)


@kernel
def advance_rows(
    ids: NDArray[np.int64],
    first_row: int,
    last_row: int,
    slots: NDArray[np.int64],
    segments: NDArray[np.int64],
    chain: NDArray[np.int32],
    longest: NDArray[np.int32],
    tail: NDArray[np.int32],
) -> None:
    """Applies `segment_match.advance` to the texts of rows first_row..last_row-1.

    The shortest length with an entry in the chain, that of a key, is looked up first, at the text's end.
    If it does not occur, no longer one does, so the tokens before the end are skipped. If it does,
    `advance` goes token by token.

    Args:
        ids: int64, shape (rows,).
        slots: int64, shape (slots, SLOT_FIELDS). LOCATED becomes LENGTH.
        segments: int64, shape (segments, SEGMENT_FIELDS).
        chain: int32, shape (slots, segments, LONGEST + 1, 2).
        longest: int32, shape (slots, segments).
        tail: int32, shape (slots, LONGEST).
    """
    each = len(segments) * (SHORT + 1)
    together = max(TOGETHER // max(each, 1), 1)
    room = together * each
    queries = np.empty((room, QUERY_FIELDS), np.int64)
    prefixes = np.empty(room, np.uint64)
    low = np.empty(room, np.int64)
    entries = np.empty((room, 2), np.int32)
    end = np.empty(LONGEST, np.int32)
    for begin in range(first_row, last_row, together):
        stop = min(begin + together, last_row)
        asked = np.int64(0)
        for row in range(begin, stop):
            slot = ids[row] & SLOT_MASK
            length = slots[slot, LENGTH]
            if slots[slot, LOCATED] == length:
                continue
            text = int32_row(slots[slot, TEXT], length)
            for segment in range(len(segments)):
                asked = _ask(segments, segment, text, queries, prefixes, asked)
        find_together(segments, queries, prefixes, low, entries, asked)
        asked = np.int64(0)
        for row in range(begin, stop):
            slot = ids[row] & SLOT_MASK
            length = slots[slot, LENGTH]
            if slots[slot, LOCATED] == length:
                continue
            text = int32_row(slots[slot, TEXT], length)
            for segment in range(len(segments)):
                count = 64 // segments[segment, BITS]
                short, whole = _asked(segments, segment, text)
                occurs = False
                if whole:
                    occurs = entries[asked + short, 0] != entries[asked + short, 1]
                if occurs:
                    for index in range(LONGEST):
                        end[index] = tail[slot, index]
                    advance(
                        segments[segment : segment + 1], chain[slot, segment : segment + 1],
                        longest[slot, segment : segment + 1], end, text[slots[slot, LOCATED] :],
                    )  # fmt: skip
                else:
                    longest[slot, segment] = 0
                    for size in range(1, count):
                        chain[slot, segment, size, 0] = 0
                        chain[slot, segment, size, 1] = UNKNOWN
                    chain[slot, segment, count, 0] = 0
                    chain[slot, segment, count, 1] = 0
                for size in range(1, short + 1):
                    chain[slot, segment, size, 0] = entries[asked, 0]
                    chain[slot, segment, size, 1] = entries[asked, 1]
                    asked += 1
                if whole:
                    asked += 1
            for index in range(LONGEST):
                at = length - LONGEST + index
                tail[slot, index] = text[at] if at >= 0 else -1
            slots[slot, LOCATED] = length


@kernel
def _asked(segments: NDArray[np.int64], segment: int, text: NDArray[np.int32]) -> tuple[int, bool]:
    """Number of short lengths of a text's end to look up, 1, 2, ..., and whether that of a key is among them.

    Ends with a token that the segment cannot hold, or longer than the text, are left out.
    """
    bits, separator = segments[segment, BITS], segments[segment, SEPARATOR]
    count = 64 // bits
    usable = np.int64(0)
    while usable < min(count, len(text)):
        token = text[len(text) - 1 - usable]
        if token == separator or token >> bits != 0:
            break
        usable += 1
    return min(usable, SHORT, count - 1), usable == count


@kernel
def _ask(
    segments: NDArray[np.int64],
    segment: int,
    text: NDArray[np.int32],
    queries: NDArray[np.int64],
    prefixes: NDArray[np.uint64],
    asked: int,
) -> int:
    """Adds the lookups of a text's end in a segment. Returns the number of lookups."""
    bits = segments[segment, BITS]
    count = 64 // bits
    short, whole = _asked(segments, segment, text)
    prefix = np.uint64(0)
    for size in range(1, count + 1):
        if size > short and not whole:
            break
        prefix |= np.uint64(text[len(text) - size]) << np.uint64(bits * (size - 1))
        if size <= short or size == count:
            queries[asked, SEGMENT] = segment
            queries[asked, TOKENS_ASKED] = size
            queries[asked, SHIFT] = bits * (count - size)
            prefixes[asked] = prefix
            asked += 1
    return asked
