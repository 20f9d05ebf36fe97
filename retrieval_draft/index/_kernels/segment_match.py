"""Occurrences of a text's end in suffix-sorted segments, for every length of that end, token by token.

A segment is described by a row of int64: see the fields below. For each segment a session keeps, for
length = 1..LONGEST, the interval of the suffix array whose suffixes begin with the last `length` tokens:

    chain[segment, length] = first, last + 1      several occurrences, or none where both are equal
    chain[segment, length] = position, SINGLE     one occurrence, which begins at `position`
    chain[segment, length] = 0, UNKNOWN           not looked up (short lengths only, rarely needed)

Invariant: after `advance`, ``longest[segment]`` is the longest length that occurs, and every entry from
the segment's key length up to it is known. The interval of length + 1 after a token is the part of the
interval of length before it whose suffixes have the token next, so a token costs one binary search for
each length that still matches. Up to the key length no interval is narrowed: it is found by
the packed key itself, first among the keys of every STRIDE-th suffix, which stay in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft._kernels.memory import load_int32, load_token, load_uint64
from retrieval_draft.index._kernels.sizes import STRIDE

TOKENS, LENGTH, WIDTH, SEPARATOR, SUFFIXES, SIZE, SAMPLES, NUM_SAMPLES, BITS = range(9)
"""Address and number of the tokens, bytes of each, the separator; address and length of the suffix array;
address and number of the sampled keys; bits of a token in a key."""
SEGMENT_FIELDS = 9

LONGEST = 32
"""Tokens of context that are compared."""

SINGLE = -1
UNKNOWN = -2


@kernel
def token_at(segments: NDArray[np.int64], segment: int, position: int) -> int:
    """The token at a position of a segment's text.

    A suffix array that was altered on disk may hold any position: one outside reads as the end of a text.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        segment: Index of the segment.
        position: Position in its text.
    """
    if position < 0 or position >= segments[segment, LENGTH]:
        return segments[segment, SEPARATOR]
    return load_token(segments[segment, TOKENS], segments[segment, WIDTH], position)


@kernel
def prefix_at(segments: NDArray[np.int64], segment: int, position: int, size: int) -> Any:
    """uint64: the next `size` tokens packed, at most those of a key; zeros after the end of the text."""
    bits, separator = segments[segment, BITS], segments[segment, SEPARATOR]
    prefix = np.uint64(0)
    for ahead in range(size):
        token = token_at(segments, segment, position + ahead)
        prefix = (prefix << np.uint64(bits)) | np.uint64(token)
        if token == separator:
            return prefix << np.uint64(bits * (size - 1 - ahead))
    return prefix


@kernel
def key_at(segments: NDArray[np.int64], segment: int, position: int) -> Any:
    """uint64: the next tokens packed, as many as fit into 64 bits."""
    return prefix_at(segments, segment, position, 64 // segments[segment, BITS])


@kernel
def sample_keys(segments: NDArray[np.int64], segment: int, keys: NDArray[np.uint64]) -> None:
    """Fills `keys` with the key of every STRIDE-th suffix.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        segment: Index of the segment.
        keys: uint64, shape (samples,). Written.
    """
    for sample in range(len(keys)):
        keys[sample] = key_at(segments, segment, load_int32(segments[segment, SUFFIXES], sample * STRIDE))


@kernel
def _sample_below(
    segments: NDArray[np.int64], segment: int, prefix: int, shift: int, above: int, first: int
) -> int:
    """First sample from `first` on whose key, shifted right, is at least ``prefix + above``."""
    wanted = np.uint64(prefix)
    samples = segments[segment, SAMPLES]
    last = segments[segment, NUM_SAMPLES]
    while first < last:
        middle = (first + last) >> 1
        key = load_uint64(samples, middle) >> np.uint64(shift)
        if key < wanted or (above == 1 and key == wanted):
            first = middle + 1
        else:
            last = middle
    return first


@kernel
def _suffix_below(
    segments: NDArray[np.int64], segment: int, prefix: int, shift: int, above: int, low: int, high: int
) -> int:
    """First suffix in low..high-1 whose key, shifted right, is at least ``prefix + above``, or `high`."""
    wanted = np.uint64(prefix)
    suffixes = segments[segment, SUFFIXES]
    while low < high:
        middle = (low + high) >> 1
        key = key_at(segments, segment, load_int32(suffixes, middle)) >> np.uint64(shift)
        if key < wanted or (above == 1 and key == wanted):
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def find_short(
    segments: NDArray[np.int64],
    segment: int,
    tail: NDArray[np.int32],
    length: int,
    entry: NDArray[np.int32],
) -> None:
    """Looks the last `length` tokens up by their key; `length` is at most that of a key.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        segment: Index of the segment.
        tail: int32, shape (n,). The text's end.
        length: Tokens to look up.
        entry: int32, shape (2,). The chain's entry, written.
    """
    bits = segments[segment, BITS]
    separator = segments[segment, SEPARATOR]
    prefix = np.uint64(0)
    for index in range(len(tail) - length, len(tail)):
        token = tail[index]
        if token == separator or token >> bits != 0:  # no token of this segment, so it does not occur
            entry[0] = 0
            entry[1] = 0
            return
        prefix = (prefix << np.uint64(bits)) | np.uint64(token)
    shift = bits * (64 // bits - length)
    size = segments[segment, SIZE]
    sample = _sample_below(segments, segment, prefix, shift, 0, 0)
    end = min(sample * STRIDE, size)
    low = _suffix_below(segments, segment, prefix, shift, 0, max((sample - 1) * STRIDE + 1, 0), end)
    # The interval ends in the same block, mostly at once, or it holds at least one sample.
    if low < end:
        high = low
        step = 1
        suffixes = segments[segment, SUFFIXES]
        while (
            high < end and key_at(segments, segment, load_int32(suffixes, high)) >> np.uint64(shift) == prefix
        ):
            low_known = high
            high += step
            step *= 2
        if high == low:
            entry[0] = 0
            entry[1] = 0
            return
        high = min(high, end)
        if high < end or sample == segments[segment, NUM_SAMPLES]:
            high = _suffix_below(segments, segment, prefix, shift, 1, low_known + 1, high)
            enter(segments, segment, entry, low, high)
            return
    if sample < segments[segment, NUM_SAMPLES]:
        above = _sample_below(segments, segment, prefix, shift, 1, sample)
        first = max((above - 1) * STRIDE + 1, low)
        high = _suffix_below(segments, segment, prefix, shift, 1, first, min(above * STRIDE, size))
    else:
        high = low
    enter(segments, segment, entry, low, high)


@kernel
def enter(segments: NDArray[np.int64], segment: int, entry: NDArray[np.int32], low: int, high: int) -> None:
    """Writes the entry of a chain for suffixes low..high-1.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        segment: Index of the segment.
        entry: int32, shape (2,). Written.
        low: Rank of the first suffix.
        high: Rank after the last one.
    """
    if high - low == 1:
        entry[0] = load_int32(segments[segment, SUFFIXES], low)
        entry[1] = SINGLE
    else:
        entry[0] = low
        entry[1] = max(high, low)


@kernel
def _narrow(
    segments: NDArray[np.int64],
    segment: int,
    entry: NDArray[np.int32],
    depth: int,
    token: int,
    target: NDArray[np.int32],
) -> bool:
    """The part of an interval, which agrees in `depth` tokens, that has `token` next.

    Returns:
        True if there is one.
    """
    low, high = np.int64(entry[0]), np.int64(entry[1])
    if high == SINGLE:
        if token_at(segments, segment, low + depth) != token:
            return False
        target[0] = low
        target[1] = SINGLE
        return True
    suffixes = segments[segment, SUFFIXES]
    end = high
    while low < high:
        middle = (low + high) >> 1
        if token_at(segments, segment, load_int32(suffixes, middle) + depth) < token:
            low = middle + 1
        else:
            high = middle
    # Most intervals end soon: search near before far.
    step = 1
    high = low
    while high < end and token_at(segments, segment, load_int32(suffixes, high) + depth) == token:
        low_known = high
        high += step
        step *= 2
    if high == low:
        return False
    first = low
    low, high = low_known + 1, min(high, end)
    while low < high:
        middle = (low + high) >> 1
        if token_at(segments, segment, load_int32(suffixes, middle) + depth) == token:
            low = middle + 1
        else:
            high = middle
    enter(segments, segment, target, first, low)
    return True


@kernel
def advance(
    segments: NDArray[np.int64],
    chain: NDArray[np.int32],
    longest: NDArray[np.int32],
    tail: NDArray[np.int32],
    tokens: NDArray[np.int32],
) -> None:
    """Appends `tokens` to the text whose last tokens are in `tail`.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        chain: int32, shape (segments, LONGEST + 1, 2).
        longest: int32, shape (segments,).
        tail: int32, shape (LONGEST,). The text's end, -1 where it is shorter.
        tokens: int32, shape (m,).
    """
    for token in tokens:
        for index in range(LONGEST - 1):
            tail[index] = tail[index + 1]
        tail[LONGEST - 1] = token
        for segment in range(len(segments)):
            count = 64 // segments[segment, BITS]
            reached = 0
            known = token != segments[segment, SEPARATOR]
            for length in range(min(longest[segment], LONGEST - 1), count - 1, -1):
                if known and _narrow(
                    segments, segment, chain[segment, length], length, token, chain[segment, length + 1]
                ):
                    reached = max(reached, length + 1)
                else:
                    chain[segment, length + 1, 0] = 0
                    chain[segment, length + 1, 1] = 0
            for length in range(1, count):
                chain[segment, length, 0] = 0
                chain[segment, length, 1] = UNKNOWN
            chain[segment, count, 0] = 0
            chain[segment, count, 1] = 0
            if tail[LONGEST - count] >= 0:
                find_short(segments, segment, tail, count, chain[segment, count])
                if chain[segment, count, 1] != chain[segment, count, 0]:
                    reached = max(reached, count)
            longest[segment] = reached


@kernel
def locate(
    segments: NDArray[np.int64],
    segment: int,
    chain: NDArray[np.int32],
    longest: NDArray[np.int32],
    tail: NDArray[np.int32],
) -> None:
    """Finds the text's end in one segment from scratch, with the result of `advance`.

    Each length is looked up by its first key and narrowed by the tokens after it, until one does not occur:
    then no longer one does.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        segment: Index of the segment.
        chain: int32, shape (segments, LONGEST + 1, 2). Its row is written.
        longest: int32, shape (segments,). Its entry is written.
        tail: int32, shape (LONGEST,). The text's end, -1 where it is shorter.
    """
    count = 64 // segments[segment, BITS]
    for length in range(LONGEST + 1):
        chain[segment, length, 0] = 0
        chain[segment, length, 1] = UNKNOWN if 0 < length < count else 0
    longest[segment] = 0
    for length in range(count, LONGEST + 1):
        first = LONGEST - length
        entry = chain[segment, length]
        if tail[first] < 0:
            return
        find_short(segments, segment, tail[: first + count], count, entry)
        found = entry[0] != entry[1]
        for depth in range(count, length):
            token = tail[first + depth]
            found = (
                found
                and token != segments[segment, SEPARATOR]
                and _narrow(segments, segment, entry, depth, token, entry)
            )
        if not found:
            entry[0] = 0
            entry[1] = 0
            return
        longest[segment] = length


@kernel
def occurrences(
    segments: NDArray[np.int64],
    segment: int,
    chain: NDArray[np.int32],
    longest: NDArray[np.int32],
    tail: NDArray[np.int32],
    length: int,
) -> int:
    """Number of occurrences of the last `length` tokens in a segment; looks them up where unknown.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        segment: Index of the segment.
        chain: int32, shape (segments, LONGEST + 1, 2). An unknown entry is written.
        longest: int32, shape (segments,).
        tail: int32, shape (LONGEST,). The text's end, -1 where it is shorter.
        length: 1 to LONGEST.
    """
    count = 64 // segments[segment, BITS]
    if length >= count and length > longest[segment]:
        return 0
    entry = chain[segment, length]
    if entry[1] == UNKNOWN:
        entry[0] = 0
        entry[1] = 0
        if tail[LONGEST - length] >= 0:
            find_short(segments, segment, tail, length, entry)
    if entry[1] == SINGLE:
        return 1
    return entry[1] - entry[0]


@kernel
def match_lengths(
    segments: NDArray[np.int64],
    chain: NDArray[np.int32],
    longest: NDArray[np.int32],
    tail: NDArray[np.int32],
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int32],
) -> None:
    """Appends `tokens` one by one and writes the longest matched length over all segments after each.

    Args:
        segments: int64, shape (segments, SEGMENT_FIELDS).
        chain: int32, shape (segments, LONGEST + 1, 2). Changed, as are the next two.
        longest: int32, shape (segments,).
        tail: int32, shape (LONGEST,).
        tokens: int32, shape (m,).
        lengths: int32, shape (m,). Written.
    """
    for index in range(len(tokens)):
        advance(segments, chain, longest, tail, tokens[index : index + 1])
        lengths[index] = 0
        for segment in range(len(segments)):
            lengths[index] = max(lengths[index], longest[segment])
