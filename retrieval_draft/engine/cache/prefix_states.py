"""States after earlier texts, of models that continue from such a border, and from no token between two."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from retrieval_draft.engine.cache.chain_cache import ChainCache
from retrieval_draft.engine.cache.prefix_tree import common_length
from retrieval_draft.engine.cache.saved_states import can_crop, snapshot, tensors_of
from retrieval_draft.index.source import TokenArray

__all__ = ["PrefixStates", "StatePrefix"]

_MOST = 256
"""Most texts, so that all can be compared with a prompt."""

_APART = 512
"""Tokens between two borders in one prompt."""


@dataclass(slots=True)
class _Border:
    """States after a text.

    Attributes:
        key: Sets texts apart.
        text: int32.
        states: A cache of the model's own.
        nbytes: Its bytes.
    """

    key: Hashable
    text: TokenArray
    states: Any
    nbytes: int


class PrefixStates:
    """Copies of whole caches; those used longest ago are removed.

    Args:
        max_bytes: Limit of all of them.

    Attributes:
        nbytes: Their bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._borders: OrderedDict[int, _Border] = OrderedDict()
        self._numbers = count()

    def clear(self) -> None:
        """Forgets all texts."""
        self._borders.clear()
        self.nbytes = 0

    def find(self, key: Hashable, text: TokenArray) -> StatePrefix | None:
        """The longest beginning of a text, int32, shape (n,), whose states are known."""
        best, longest = None, 0
        for number, border in self._borders.items():
            if border.key != key:
                continue
            length = len(border.text)
            common = common_length(border.text, text)
            if common > longest and (common == length or can_crop(border.states, length)):
                best, longest = number, common
        if best is None:
            return None
        self._borders.move_to_end(best)
        border = self._borders[best]
        return StatePrefix(longest, len(border.text), border.states)

    def keep(self, key: Hashable, text: TokenArray, cache: ChainCache, at: int) -> int:
        """Copies the states after a text, where the last border is far enough or the text ends.

        Args:
            key: Sets it apart from others.
            text: int32, shape (n,). All of it that is known.
            cache: Holds its beginning, and nothing else.
            at: The last border of this text.

        Returns:
            The border that it has now.
        """
        end = cache.get_seq_length()
        if not end or (end < len(text) and end - at < _APART):
            return at
        part = text[:end].copy()
        for number, border in list(self._borders.items()):
            if (
                border.key == key
                and len(border.text) <= end
                and not (border.text != part[: len(border.text)]).any()
            ):
                # From the new one a cache that can be cropped goes back to the old one.
                if len(border.text) == end:
                    self._borders.move_to_end(number)
                    return end
                if can_crop(cache.inner, end):
                    self._remove(number)
        states = snapshot(cache.inner)
        nbytes = part.nbytes + sum(
            storage.nbytes()
            for storage in {
                each.untyped_storage().data_ptr(): each.untyped_storage()
                for each in tensors_of([vars(layer) for layer in getattr(states, "layers", None) or [states]])
            }.values()
        )
        if nbytes > self._max_bytes:
            return at
        while self._borders and (self.nbytes + nbytes > self._max_bytes or len(self._borders) >= _MOST):
            self._remove(next(iter(self._borders)))
        self._borders[next(self._numbers)] = _Border(key, part, states, nbytes)
        self.nbytes += nbytes
        return end

    def _remove(self, number: int) -> None:
        self.nbytes -= self._borders.pop(number).nbytes


@dataclass(frozen=True, slots=True)
class StatePrefix:
    """The beginning of a text, with the states after it.

    Attributes:
        length: Its tokens.
        held: Tokens of the states, which are cropped.
        states: A cache of the model's own, which stays as it is.
    """

    length: int
    held: int
    states: Any

    def fill(self, cache: Any) -> Iterator[None]:
        """Gives an empty cache a copy."""
        cache.passed(snapshot(self.states), self.held)
        if not cache.keep(self.length):
            raise RuntimeError("States could not be cropped.")
        yield
