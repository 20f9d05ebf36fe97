"""Suffix arrays of token runs, sorted by several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["key_bits", "sort_suffixes"]


def key_bits(separator: int, largest: int) -> int:
    """Bits of a token in a sort key: 16 up to 65,535, as few as hold both values from there on."""
    return max(16, int(max(separator, largest)).bit_length())


def sort_suffixes(tokens: NDArray[Any], separator: int, bits: int, threads: int = 1) -> NDArray[np.int32]:
    """Positions of all tokens, ordered by the text from there on; separators are left out.

    Suffixes are compared up to the end of their text or 96 tokens, whichever is first; suffixes equal so far
    are in the order of the text. Beyond the result it takes 21 bytes for each suffix of the most frequent
    token and thread.

    Args:
        tokens: uint16 or uint32, shape (n,). Each text ends in `separator`; so does the last.
        separator: A value that is no token of a text.
        bits: From `key_bits`.
        threads: Workers; they release the GIL.

    Returns:
        int32, shape (n - separators,).

    Example:
        tokens 7 8 9 7 8 5 S, S = 10  ->  5 (5 S), 3 (7 8 5), 0 (7 8 9), 4 (8 5), 1 (8 9), 2 (9 7 8): with
        5 < 9 the suffix at 3 comes before that at 0
    """
    from retrieval_draft.index._kernels import suffix_sort

    if not len(tokens):
        return np.empty(0, np.int32)
    starts = np.zeros(max(int(tokens.max()), separator) + 2, np.int64)
    tokens = np.ascontiguousarray(tokens)
    text = (tokens.ctypes.data, tokens.dtype.itemsize, len(tokens))
    suffix_sort.count_tokens(*text, separator, starts)
    suffixes = np.empty(int(starts[-1]), np.int32)
    cuts = np.searchsorted(starts, np.arange(1, threads) * len(suffixes) // threads)
    bounds = [0, *(int(cut) for cut in cuts), len(starts) - 1]

    def work(first: int, last: int) -> None:
        if first >= last:
            return
        room = max(int(np.diff(starts[first : last + 1]).max()), 1)
        suffix_sort.sort_buckets(
            *text, separator, bits, starts, first, last, suffixes, np.empty(room, np.uint64),
            np.empty(room, np.uint64), np.empty(room, np.int32), np.empty(room, np.uint8),
        )  # fmt: skip

    if threads == 1:
        work(bounds[0], bounds[-1])
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, bounds, bounds[1:]))
    return suffixes
