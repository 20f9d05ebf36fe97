"""The trees of a batch's rows, packed for one pass and copied to the device at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import (
    MOVES,
    TreeAttention,
    TreeInputs,
    Upload,
    kernels,
    packed_words,
    slots_of_moves,
)
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache

__all__ = ["TreeRows", "most_moves"]

_MOST_MOVES = 256
"""Slots that move in a pass over several rows, those that need not included: of a model with 8 billion
weights, 34 megabytes."""


def most_moves(rows: int) -> int:
    """Slots of a row's path that a captured pass over so many rows moves."""
    return min(MOVES, _MOST_MOVES // rows)


class TreeRows(Upload):
    """A tree of the same padded size for each lane of an arena.

    Lanes without a row hold a root at position 0 and nodes that see themselves alone, whose results are
    not read.

    Args:
        device: Of the model's inputs.

    Attributes:
        rows: Lanes.
        nodes: Nodes of each padded tree.
        packed: int64, shape (rows, `packed_words(nodes)` and words for draws), on the device, once sent.
        moves: int64, shape (2, rows, `most_moves(rows)`), on the device, once sent: slots whose keys move,
            and those that they move to; slot 0 to itself where fewer move.
        sent: int64. Both of these, one after the other.

    Example:
        two rows in lanes 0 and 2 with trees of 3 and 5 nodes: 4 lanes of 8 nodes
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rows = self.nodes = self._width = 0
        self.packed: Tensor
        self.moves: Tensor
        self.sent: Tensor
        self._lanes: Mapping[int, int] = {}
        self._lengths: dict[int, tuple[int, int]] = {}
        self._empty: dict[tuple[int, int], NDArray[np.int64]] = {}

    def begin(self, rows: int, nodes: int, lanes: Mapping[int, int], draw_words: int = 0) -> None:
        """Empties all lanes.

        Args:
            rows: Lanes.
            nodes: Nodes of each padded tree.
            lanes: The lane of each cache, by its identity.
            draw_words: Of each lane, for draws at the nodes.
        """
        self._wait()
        self.rows, self.nodes, self._lanes = rows, nodes, lanes
        self._lengths = {}
        words = self._width = packed_words(nodes) + draw_words
        self._reserve(rows * (words + 2 * most_moves(rows)))
        kind = nodes, draw_words
        if kind not in self._empty:
            empty = np.zeros(words, np.int64)
            if nodes > 1:
                bits = empty[3 * nodes + 1 :].view(np.bool_)[: nodes * nodes]
                bits.reshape(nodes, nodes)[:] = ~np.eye(nodes, dtype=bool)
            self._empty[kind] = empty
        self._words[: rows * words].reshape(rows, words)[:] = self._empty[kind]
        self._moves[:] = 0

    @property
    def _moves(self) -> NDArray[np.int64]:
        """(2, rows, `most_moves(rows)`). The host's part of `moves`."""
        begin, most = self.rows * self._width, most_moves(self.rows)
        return self._words[begin : begin + 2 * self.rows * most].reshape(2, self.rows, most)

    def lane_of(self, cache: SpeculativeCache) -> int:
        """The lane of a cache."""
        return self._lanes[id(cache)]

    def pack(
        self,
        cache: SpeculativeCache,
        tree: DraftTree,
        length: int,
        moved: NDArray[np.int64] | None = None,
        kept: int = 0,
        draws: NDArray[np.int64] | None = None,
    ) -> None:
        """Writes the tree of one row.

        Args:
            cache: Works in one of the lanes. Its path is not committed yet.
            tree: The tree to verify, the root included; at most `nodes`.
            length: Committed tokens, the path included.
            moved: int64, shape (m,). As for `SpeculativeCache.commit`; at most `most_moves` of them.
            kept: As for `SpeculativeCache.commit`.
            draws: int64, shape (draw_words,). As for `TreeAttention.prepare`; zeros without.
        """
        nodes, lane = self.nodes, self.lane_of(cache)
        at, after = lane * self._width, lane * self._width + 3 * nodes
        max_depth = kernels.pack_tree(
            tree.tokens,
            tree.parents,
            tree.depths,
            length + cache.shift,
            nodes,
            self._words[at:],
            self._bytes[8 * (after + 1) :],
        )
        self._words[after] = length
        if draws is not None:
            self._words[(lane + 1) * self._width - len(draws) : (lane + 1) * self._width] = draws
        self._lengths[lane] = length, max_depth
        if moved is not None:
            self._moves[:, lane, : len(moved)] = slots_of_moves(moved, cache.get_seq_length(), kept)

    def send(self) -> None:
        """Copies all lanes to the device, with the slots whose keys move."""
        rows, words, most = self.rows, self._width, most_moves(self.rows)
        self.sent = self._send(rows * (words + 2 * most))
        self.packed = self.sent[: rows * words].view(rows, words)
        self.moves = self.sent[rows * words :].view(2, rows, most)

    def inputs(self, cache: SpeculativeCache, attention: TreeAttention) -> TreeInputs:
        """One row's tree for a pass of its own: `attention` makes its masks where they are asked for."""
        lane = self.lane_of(cache)
        length, max_depth = self._lengths[lane]
        made = attention.unpack(self.packed[lane], self.nodes, 0, max_depth, length)
        made.lane = self, lane
        return made
