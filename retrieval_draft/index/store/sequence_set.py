"""Sequence numbers of a server's received entries."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

__all__ = ["MAX_GAPS", "SequenceSet"]

MAX_GAPS = 1024
"""Gaps remembered. A server leaves one only where Redis lost entries before it sent them again."""


class SequenceSet:
    """Sequence numbers, as ranges: one range for a server whose entries come in order.

    So an entry that is written twice, or read twice, or arrives long after its successors, is added once.
    Beyond `MAX_GAPS` gaps the lowest is closed, and its numbers count as known.

    Args:
        bounds: First and last number of each range in turn, ascending.

    Example:
        add(0), add(2), add(2), add(1), add(1)  ->  True, True, False, True, False; bounds 0 2
    """

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, bounds: Sequence[int] = ()) -> None:
        self._firsts = list(bounds[::2])
        self._lasts = list(bounds[1::2])

    @property
    def bounds(self) -> list[int]:
        """First and last number of each range in turn, ascending."""
        return [bound for pair in zip(self._firsts, self._lasts, strict=True) for bound in pair]

    def add(self, number: int) -> bool:
        """Adds a number.

        Returns:
            True if it is the first time.
        """
        firsts, lasts = self._firsts, self._lasts
        if lasts and number == lasts[-1] + 1:
            lasts[-1] = number
            return True
        index = bisect_right(firsts, number)
        if index and number <= lasts[index - 1]:
            return False
        joins_left = index > 0 and number == lasts[index - 1] + 1
        joins_right = index < len(firsts) and number == firsts[index] - 1
        if joins_left and joins_right:
            lasts[index - 1] = lasts.pop(index)
            del firsts[index]
        elif joins_left:
            lasts[index - 1] = number
        elif joins_right:
            firsts[index] = number
        else:
            firsts.insert(index, number)
            lasts.insert(index, number)
            if len(firsts) > MAX_GAPS + 1:
                del firsts[1], lasts[0]
        return True

    def __contains__(self, number: int) -> bool:
        """True if a number was added, or counts as known."""
        index = bisect_right(self._firsts, number)
        return index > 0 and number <= self._lasts[index - 1]

    def __len__(self) -> int:
        """Numbers in all ranges."""
        return sum(self._lasts) - sum(self._firsts) + len(self._firsts)
