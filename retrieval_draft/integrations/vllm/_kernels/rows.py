"""Matching of a batch's rows to the known texts that they continue."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from retrieval_draft._kernels.jit import kernel

__all__ = ["follow_rows"]


_BLOCK = 512
"""Tokens compared at a time, without a branch, so that they go through vector registers."""


@kernel
def _same(left: NDArray[np.int32], right: NDArray[np.int32], length: int) -> bool:
    end = length
    while end > 0:  # from the end, where different texts differ most often
        begin = max(end - _BLOCK, 0)
        one, other = left[begin:end], right[begin:end]
        different = np.int32(0)
        for token in range(len(one)):
            different |= one[token] ^ other[token]
        if different != 0:
            return False
        end = begin
    return True


@kernel
def _is_inside(row: int, rows: int, start: int, end: int, width: int) -> bool:
    """True if the engine's row exists, and its token range lies within it."""
    return 0 <= row < rows and 0 <= start <= end <= width


@kernel
def follow_rows(
    token_ids: NDArray[np.int32],
    rows: NDArray[np.int64],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
    guesses: NDArray[np.int64],
    known: NDArray[np.int32],
    lengths: NDArray[np.int64],
    claimed: NDArray[np.bool_],
    found: NDArray[np.int64],
) -> None:
    """Finds for each row the known text that equals its own up to its new tokens, and appends those to it.

    Invariant: a text is claimed by at most one row, and only if it equals the whole text of that row before
    its new tokens. Guesses come first; the other texts are searched only for rows whose guess is wrong.

    Args:
        token_ids: int32, shape (batch, width). Texts of all rows.
        rows: int64, shape (n,). Rows of `token_ids` to match, each once.
        starts: int64, shape (n,). Tokens of each that are not new.
        ends: int64, shape (n,). Tokens of each, the new ones included.
        guesses: int64, shape (n,). The slot that each row had before, all different; -1 for none.
        known: int32, shape (slots, width). Known texts; new tokens are appended.
        lengths: int64, shape (slots,). Their lengths, -1 for free slots; those of matched texts grow.
        claimed: bool, shape (slots,). Scratch.
        found: int64, shape (n,). The slot of each row is written here, -1 where its text is not known, or its
            numbers are invalid.

    Example:
        known [5 6 7], [5 6 8]; a row 5 6 8 9 of which 9 is new, its guess 0  ->  found 1, now [5 6 8 9]
    """
    claimed[:] = False
    missing = 0
    width = min(token_ids.shape[1], known.shape[1])
    for index in range(len(rows)):
        slot = guesses[index]
        found[index] = -1
        if not _is_inside(rows[index], len(token_ids), starts[index], ends[index], width):
            continue
        fits = 0 <= slot < len(lengths) and lengths[slot] == starts[index]
        if fits and _same(known[slot], token_ids[rows[index]], starts[index]):
            found[index] = slot
            claimed[slot] = True
        else:
            missing += 1
    if missing:
        for index in range(len(rows)):
            if found[index] >= 0 or not _is_inside(
                rows[index], len(token_ids), starts[index], ends[index], width
            ):
                continue
            for slot in range(len(lengths)):
                if claimed[slot] or lengths[slot] != starts[index]:
                    continue
                if _same(known[slot], token_ids[rows[index]], starts[index]):
                    found[index] = slot
                    claimed[slot] = True
                    break
    for index in range(len(rows)):
        slot = found[index]
        if slot >= 0:
            known[slot, starts[index] : ends[index]] = token_ids[rows[index], starts[index] : ends[index]]
            lengths[slot] = ends[index]
