"""Suffix sorting to a bounded depth, by keys of several tokens at a time.

Suffixes are bucketed by their first token; a bucket is sorted by a key of the next few tokens packed into
64 bits, and so is each run of equal keys, until all differ, a text ends, or DEPTH tokens are equal. Suffixes
equal that far stay in the order of the text. Lookups use no more than DEPTH tokens, so they see no difference
from a full sort, and text that repeats itself costs DEPTH / (tokens per key) passes at most.

Every text ends in a separator, a value no token has, so that no key reaches beyond the array.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel
from retrieval_draft._kernels.memory import load_token

DEPTH = 96
"""Tokens by which suffixes are ordered."""

FEW = 24
"""Up to so many are sorted by insertion."""

DIGITS = 8
_RADIX = 256


@kernel
def count_tokens(address: int, width: int, length: int, separator: int, starts: NDArray[np.int64]) -> None:
    """Writes the start of each token's suffixes in the suffix array, ``starts[t]``, and last their number.

    Args:
        address: Address of the tokens, `length` of them, `width` bytes each.
        starts: int64, shape (largest token + 2,), zeros; overwritten.
    """
    for position in range(length):
        token = load_token(address, width, position)
        if token != separator and token + 1 < len(starts):
            starts[token + 1] += 1
    for token in range(1, len(starts)):
        starts[token] += starts[token - 1]


@kernel
def sort_buckets(
    address: int,
    width: int,
    length: int,
    separator: int,
    bits: int,
    starts: NDArray[np.int64],
    first: int,
    last: int,
    suffixes: NDArray[np.int32],
    keys: NDArray[np.uint64],
    spare_keys: NDArray[np.uint64],
    spare: NDArray[np.int32],
    heads: NDArray[np.uint8],
) -> None:
    """Sorts the suffixes that begin with the tokens first..last-1.

    Args:
        address: Address of the tokens, `length` of them, `width` bytes each. The last should be a separator;
            another one is assumed after it.
        bits: Bits of a token in a key; the separator fits too.
        starts: From `count_tokens`.
        suffixes: int32, shape (starts[-1],). Written between starts[first] and starts[last].
        keys: uint64, shape (bucket,), the largest bucket in the range. Scratch, as are the next three.
        spare_keys: uint64, shape (bucket,).
        spare: int32, shape (bucket,).
        heads: uint8, shape (bucket,).
    """
    cursor = starts[first : last + 1].copy()
    for position in range(length):
        token = load_token(address, width, position)
        if first <= token < last and token != separator:
            suffixes[cursor[token - first]] = position
            cursor[token - first] += 1
    histogram = np.empty((DIGITS, _RADIX), np.int32)
    for token in range(first, last):
        begin, end = starts[token], starts[token + 1]
        if end - begin > 1:
            bucket = suffixes[begin:end]
            _sort_run(
                address, width, length, separator, bits, bucket, np.int64(1), keys, spare_keys, spare, heads,
                histogram,
            )  # fmt: skip
            _finish_runs(
                address, width, length, separator, bits, bucket, keys, spare_keys, spare, heads, histogram
            )  # fmt: skip


@kernel
def _finish_runs(
    address: int,
    width: int,
    length: int,
    separator: int,
    bits: int,
    bucket: NDArray[np.int32],
    keys: NDArray[np.uint64],
    spare_keys: NDArray[np.uint64],
    spare: NDArray[np.int32],
    heads: NDArray[np.uint8],
    histogram: NDArray[np.int32],
) -> None:
    """Sorts every run of a bucket with equal first keys, each to its end before the next is begun."""
    count = 64 // bits
    begin = 0
    while begin < len(bucket):
        end = begin + 1
        while end < len(bucket) and heads[end] == 0:
            end += 1
        if end - begin > 1 and heads[begin] == 1:
            run = bucket[begin:end]
            run_heads = heads[begin:end]
            depth = 1 + count
            active = True
            while active and depth < DEPTH:
                active = False
                low = 0
                while low < len(run):
                    high = low + 1
                    while high < len(run) and run_heads[high] == 0:
                        high += 1
                    if high - low > 1 and run_heads[low] == 1:
                        active |= _sort_run(
                            address, width, length, separator, bits, run[low:high], depth, keys, spare_keys,
                            spare, run_heads[low:high], histogram,
                        )  # fmt: skip
                    low = high
                depth += count
        begin = end


@kernel
def _sort_run(
    address: int,
    width: int,
    length: int,
    separator: int,
    bits: int,
    run: NDArray[np.int32],
    depth: int,
    keys: NDArray[np.uint64],
    spare_keys: NDArray[np.uint64],
    spare: NDArray[np.int32],
    heads: NDArray[np.uint8],
    histogram: NDArray[np.int32],
) -> bool:
    """Sorts suffixes that agree in `depth` tokens by the next key.

    Marks in `heads` where keys begin to differ: 1, or 2 where a text ends within the key, so that equal
    suffixes are equal for good; 0 for a suffix equal to its predecessor.

    Returns:
        True if equal suffixes remain that may differ further on.
    """
    size = len(run)
    count = 64 // bits
    for item in range(size):
        key = np.uint64(0)
        position = run[item] + depth
        left = count
        while left > 0:
            token = load_token(address, width, position) if position < length else separator
            key = (key << np.uint64(bits)) | np.uint64(token)
            left -= 1
            position += 1
            if token == separator:
                break
        keys[item] = key << np.uint64(bits * left)
    if size <= FEW:
        _sort_few(keys, run, size)
    else:
        _sort_many(keys, run, spare_keys, spare, size, histogram)
    open_runs = False
    heads[0] = 2 if _has_end(keys[0], separator, bits, count) else 1
    for item in range(1, size):
        if keys[item] == keys[item - 1]:
            heads[item] = 0
        else:
            heads[item] = 1
            if (
                item + 1 < size
                and keys[item + 1] == keys[item]
                and _has_end(keys[item], separator, bits, count)
            ):
                heads[item] = 2
    for item in range(1, size):
        if heads[item] == 0 and heads[item - 1] == 1:
            open_runs = True
            break
    return open_runs


@kernel
def _has_end(key: int, separator: int, bits: int, count: int) -> bool:
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for index in range(count):  # noqa: SIM110 (numba compiles no generator expressions)
        if (key >> np.uint64(bits * index)) & mask == np.uint64(separator):
            return True
    return False


@kernel
def _sort_few(keys: NDArray[np.uint64], run: NDArray[np.int32], size: int) -> None:
    """Stable insertion sort of `run` by `keys`."""
    for item in range(1, size):
        key, value = keys[item], run[item]
        slot = item
        while slot > 0 and keys[slot - 1] > key:
            keys[slot] = keys[slot - 1]
            run[slot] = run[slot - 1]
            slot -= 1
        keys[slot] = key
        run[slot] = value


@kernel
def _sort_many(
    keys: NDArray[np.uint64],
    run: NDArray[np.int32],
    spare_keys: NDArray[np.uint64],
    spare: NDArray[np.int32],
    size: int,
    histogram: NDArray[np.int32],
) -> None:
    """Stable radix sort of `run` by `keys`, lowest byte first, bytes that are all equal left out."""
    for digit in range(DIGITS):
        for value in range(_RADIX):
            histogram[digit, value] = 0
    for item in range(size):
        key = keys[item]
        for digit in range(DIGITS):
            histogram[digit, (key >> np.uint64(8 * digit)) & np.uint64(255)] += 1
    flipped = False
    for digit in range(DIGITS):
        shift = np.uint64(8 * digit)
        source_keys, source = (spare_keys, spare) if flipped else (keys, run)
        target_keys, target = (keys, run) if flipped else (spare_keys, spare)
        if histogram[digit, (source_keys[0] >> shift) & np.uint64(255)] == size:
            continue
        total = 0
        for value in range(_RADIX):
            here = histogram[digit, value]
            histogram[digit, value] = total
            total += here
        for item in range(size):
            key = source_keys[item]
            value = (key >> shift) & np.uint64(255)
            slot = histogram[digit, value]
            histogram[digit, value] = slot + 1
            target_keys[slot] = key
            target[slot] = source[item]
        flipped = not flipped
    if flipped:
        for item in range(size):
            keys[item] = spare_keys[item]
            run[item] = spare[item]
