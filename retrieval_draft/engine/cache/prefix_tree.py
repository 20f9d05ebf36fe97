"""Texts as a tree of blocks of tokens: texts with one beginning share its blocks."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Any

import numpy as np

from retrieval_draft.index.source import TokenArray

__all__ = ["Block", "PrefixTree"]

_COMPARED = 32
"""Blocks after one parent that a text is compared with where none is equal to its next block."""


class Block:
    """Some tokens after those of its parent.

    Attributes:
        parent: The block before it; None for a root, which has no tokens.
        tokens: int32. As many as a block holds; fewer at a text's end.
        data: Of the caller.
        pins: Users for which it has to stay.
        used: Time of its last use, by the tree's count.
        is_out: Whether it was removed.
    """

    __slots__ = ("_is_queued", "_ongoing", "_whole", "data", "is_out", "parent", "pins", "tokens", "used")

    def __init__(self, parent: Block | None, tokens: TokenArray, data: Any = None) -> None:
        self.parent, self.tokens, self.data = parent, tokens, data
        self.pins = self.used = 0
        self.is_out = self._is_queued = False
        self._whole: dict[bytes, Block] = {}
        self._ongoing: dict[int, list[Block]] = {}

    @property
    def is_leaf(self) -> bool:
        """True if no block comes after it."""
        return not self._ongoing


class PrefixTree:
    """Blocks under one root for each key; those used longest ago are removed first, ends before beginnings.

    Args:
        size: Tokens of a block.

    Example:
        blocks of 2, texts "a b c" and "a b d e": root -> [a b] -> [c], [d e]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._roots: dict[Hashable, Block] = {}
        self._leaves: list[tuple[int, int, Block]] = []
        self._numbers = count(1)

    def root(self, key: Hashable) -> Block:
        """The root of the texts of a key."""
        return self._roots.setdefault(key, Block(None, np.zeros(0, np.int32)))

    def child(self, parent: Block, tokens: TokenArray) -> tuple[Block | None, int]:
        """The block after `parent` with the longest common beginning with `tokens`, and its length.

        Args:
            parent: A block of full size, or a root.
            tokens: int32, shape (n,). At least one, at most `size`.
        """
        if len(tokens) == self.size:
            exact = parent._whole.get(tokens.tobytes())
            if exact is not None:
                return exact, self.size
        best, longest = None, 0
        for block in reversed(parent._ongoing.get(int(tokens[0]), [])[-_COMPARED:]):
            common = common_length(block.tokens, tokens)
            if common > longest:
                best, longest = block, common
        return best, longest

    def path(self, key: Hashable, text: TokenArray) -> Iterator[tuple[Block, int]]:
        """Blocks along the beginning of a text, int32, shape (n,), each with its number of common tokens."""
        block, at = self._roots.get(key), 0
        while block is not None and at < len(text):
            block, common = self.child(block, text[at : at + self.size])
            if block is None:
                return
            yield block, common
            at += common
            if common < self.size:
                return

    def add(self, parent: Block, tokens: TokenArray, data: Any) -> Block:
        """Adds a block, whose tokens, int32, are at least one and at most `size`."""
        block = Block(parent, tokens, data)
        self._enter(block)
        self.touch(block)
        if not block._is_queued:
            self._queue(block)
        return block

    def extend(self, block: Block, tokens: TokenArray) -> None:
        """Replaces the tokens of a block, which has fewer than `size`, by more that begin with them."""
        block.tokens = tokens
        if len(tokens) == self.size and block.parent is not None:
            block.parent._whole[tokens.tobytes()] = block

    def touch(self, block: Block) -> None:
        """Notes a use of a block; those before it are to be touched too."""
        block.used = next(self._numbers)

    def remove_oldest(self) -> Block | None:
        """Removes the end of the text that was used longest ago; None where all are pinned."""
        pinned = []
        removed = None
        while self._leaves and removed is None:
            used, _, block = heapq.heappop(self._leaves)
            block._is_queued = False
            if block.is_out or not block.is_leaf:
                continue
            if block.pins:
                pinned.append(block)
            elif block.used > used:
                self._queue(block)
            else:
                removed = block
        for block in pinned:
            self._queue(block)
        if removed is not None:
            self._leave(removed)
        return removed

    def clear(self) -> list[Block]:
        """Removes all blocks, and returns them."""
        left, out = list(self._roots.values()), []
        while left:
            block = left.pop()
            block.is_out = True
            left += [each for some in block._ongoing.values() for each in some]
            if block.parent is not None:
                out.append(block)
        self._roots, self._leaves = {}, []
        return out

    def _queue(self, block: Block) -> None:
        block._is_queued = True
        heapq.heappush(self._leaves, (block.used, next(self._numbers), block))

    def _enter(self, block: Block) -> None:
        parent = block.parent
        assert parent is not None
        parent._ongoing.setdefault(int(block.tokens[0]), []).append(block)
        if len(block.tokens) == self.size:
            parent._whole[block.tokens.tobytes()] = block

    def _leave(self, block: Block) -> None:
        block.is_out = True
        parent = block.parent
        assert parent is not None
        first = int(block.tokens[0])
        beside = parent._ongoing[first]
        beside.remove(block)
        if not beside:
            del parent._ongoing[first]
        if parent._whole.get(block.tokens.tobytes()) is block:
            del parent._whole[block.tokens.tobytes()]
        if not parent.is_leaf:
            return
        if parent.parent is not None:
            if not parent._is_queued:
                self._queue(parent)
        elif not parent.pins:
            parent.is_out = True
            self._roots = {key: root for key, root in self._roots.items() if root is not parent}


def common_length(one: TokenArray, other: TokenArray) -> int:
    """Length of the common beginning of two texts: int32, shape (n,) and (m,)."""
    shorter = min(len(one), len(other))
    differs = (one[:shorter] != other[:shorter]).nonzero()[0]
    return int(differs[0]) if len(differs) else shorter
