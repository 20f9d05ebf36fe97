"""One pass over trees of one padded size, a row each, with inputs, masks and keys at fixed addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from retrieval_draft.engine.attention.tree_mask import Mask, packed_words
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.graph.arena import Arena
from retrieval_draft.engine.graph.attention import PassTree, attending_to
from retrieval_draft.engine.graph.captured import CapturedCalls
from retrieval_draft.engine.graph.tree_rows import most_moves
from retrieval_draft.engine.sampling.node_draws import PassNodes

__all__ = ["ArenaCache", "FixedPass", "Summarise", "stage", "tree_masks"]

Summarise = Callable[[Tensor, PassNodes], Tensor]
"""Makes of logits, (rows * n, vocabulary), what the host reads of them, int32, (rows * n, columns)."""

Call = Callable[[Any, Tensor, Tensor, Mask], tuple[Tensor, Tensor | None]]
"""The model: takes a cache, token ids, positions, (rows, n) each, and a mask; gives logits, (rows * n,
vocabulary), and the states that draft sources read, (rows * n, d), or None."""


def tree_masks(
    windows: Mapping[str, int | None],
    length: Tensor,
    depths: Tensor,
    hidden: Tensor | None,
    columns: Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Masks over slots: the committed text, then the nodes; slots after these hold anything.

    Args:
        windows: Layer types with their windows.
        length: int64, shape (rows,). Committed tokens of each row.
        depths: int64, shape (rows, n). Of the nodes.
        hidden: bool, shape (rows, n, n). [r, i, j] true where node i of row r must not see its node j; None
            for roots alone.
        columns: int64, shape (keys,). 0, 1, 2, ...
        dtype: Of the masks.

    Returns:
        Additive, shape (rows, 1, n, keys), for each layer type.
    """
    nodes = depths.shape[1]
    node = columns - length[:, None]
    inside = node.clamp(0, nodes - 1)
    unseen = (node >= nodes)[:, None]
    if hidden is not None:
        columns_of = inside[:, None].expand(-1, nodes, -1)
        unseen = unseen | (hidden.gather(2, columns_of) & (node >= 0)[:, None])
    lowest = torch.finfo(dtype).min
    out = {}
    for kind, window in windows.items():
        missing = unseen.expand(-1, nodes, -1)
        if window is not None:
            depth = torch.where(node < 0, node, depths.gather(1, inside))
            missing = missing | (depths[:, :, None] - depth[:, None] >= window)
        mask = torch.zeros(missing.shape, dtype=dtype, device=missing.device)
        out[kind] = mask.masked_fill_(missing, lowest)[:, None]
    return out


class ArenaCache(Cache):
    """Writes keys and values to slots that a tensor names, and returns all slots.

    Args:
        cache: Shows the layers.
        states: Of each layer with keys, (rows, heads, keys, dim) each.
        lanes: int64, shape (rows, 1). 0, 1, 2, ...
        slots: int64, shape (rows, n).
    """

    takes_states_alone = True
    """As of `SpeculativeCache`."""

    def __init__(
        self,
        cache: SpeculativeCache,
        states: list[tuple[Tensor, Tensor] | None],
        lanes: Tensor,
        slots: Tensor,
    ) -> None:
        super().__init__(layers=cache.layers)
        of_layers = iter(states)
        own = set(cache.attention_layers)
        self._states = [next(of_layers) if layer in own else None for layer in cache.layers]
        self._lanes, self._slots = lanes, slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, (rows, heads, keys, dim) each, after new ones were written."""
        states = self._states[layer_idx]
        assert states is not None, "a layer that had no keys before has some now"
        for held, new in zip(states, (key_states, value_states), strict=True):
            if len(held) == 1:
                held.index_copy_(-2, self._slots[0], new)
            else:
                held.transpose(1, 2).index_put_((self._lanes, self._slots), new.transpose(1, 2))
        return states


class FixedPass:
    """A captured pass. It begins with the moves of the paths that the step before accepted.

    So accepting stays with the host, which draws tokens with any processor, and costs no launch: which nodes
    were accepted is known when the next trees go to the device, and goes with them. Accepted on the device,
    the same moves would end this pass; the host would still wait for it, since it drafts from its tokens.

    Args:
        rows: Lanes of the arena, from the first on.
        nodes: Of the padded tree in each.
        keys: Slots that it reads in each; texts and trees must fit.
        arena: Memory of the caches.
        windows: Layer types with their windows.
        dtype: Of the masks.
        summarise: Makes what the host reads, in the same capture; None for nothing.
        draw_words: Words for draws that each tree has.
        by_tree: Whether attention may read the trees instead of masks.

    Attributes:
        logits: (rows * n, vocabulary), row by row. Written by `run`.
        hidden: (rows * n, d). States that draft sources read, written by `run`; None where none are read.
        summary: As `summarise` made it, written by `run`.
        reads_masks: Whether a layer read a mask over all slots.
    """

    def __init__(
        self,
        rows: int,
        nodes: int,
        keys: int,
        arena: Arena,
        windows: Mapping[str, int | None],
        dtype: torch.dtype,
        summarise: Summarise | None,
        draw_words: int,
        by_tree: bool,
    ) -> None:
        self.rows, self.nodes, self.keys = rows, nodes, keys
        self._arena, self._windows, self._dtype, self._summarise = arena, windows, dtype, summarise
        self._by_tree = by_tree
        device = arena.tensors[0].device
        words, moves = rows * (packed_words(nodes) + draw_words), 2 * rows * most_moves(rows)
        self._given = torch.zeros(words + moves, dtype=torch.int64, device=device)
        self._trees, self._moves = self._given[:words].view(rows, -1), self._given[words:].view(2, rows, -1)
        self._columns = torch.arange(keys, device=device)
        self._captured: CapturedCalls | None = None
        self.logits: Tensor
        self.hidden: Tensor | None
        self.summary: Tensor | None
        self.reads_masks = True

    def capture(self, call: Call, cache: SpeculativeCache, packed: Tensor, by: CapturedCalls) -> None:
        """Runs the pass once for the record.

        Args:
            call: The model.
            cache: Works in the arena, and shows the layers.
            packed: As for `run`. Nothing may move: for some records the calls run more than once.
            by: Makes the record.
        """
        self._take(packed)
        rows, nodes = self.rows, self.nodes
        ids, positions, depths = self._trees[:, : 3 * nodes].view(rows, 3, nodes).unbind(1)
        length = self._trees[:, 3 * nodes]
        hidden = None
        if nodes > 1:
            bits = self._trees[:, 3 * nodes + 1 : packed_words(nodes)].view(torch.bool)
            hidden = bits[:, : nodes * nodes].view(rows, nodes, nodes)
        states = self._arena.keys_and_values(self.keys, rows)
        lanes = self._arena.lanes[:rows]
        given = PassNodes(ids, depths, length, hidden, self._trees[:, packed_words(nodes) :])

        def calls() -> tuple[Tensor, Tensor | None, Tensor | None]:
            self._arena.move_rows(self._moves)
            slots = self._columns[:nodes] + length[:, None]
            masks = tree_masks(self._windows, length, depths, hidden, self._columns, self._dtype)
            mask: Mask = {**masks} if len(masks) > 1 else next(iter(masks.values()))
            windows = {masks[kind].data_ptr(): window for kind, window in self._windows.items()}
            tree = PassTree(length, depths, hidden, windows)
            with attending_to(tree) if self._by_tree else nullcontext():
                logits, inputs = call(
                    ArenaCache(cache, states, lanes, slots), ids.contiguous(), positions.contiguous(), mask
                )
            self.reads_masks = tree.reads < len(cache.attention_layers)
            return logits, inputs, None if self._summarise is None else self._summarise(logits, given)

        self.logits, self.hidden, self.summary = by.capture(calls)
        self._captured = by

    def run(self, packed: Tensor) -> Tensor:
        """One pass over trees; the nodes have to be staged in their caches afterwards.

        Args:
            packed: int64. The trees, lane by lane: `TreeRows.sent`, or `TreeInputs.packed` of one; without
                the slots that move, nothing moves.

        Returns:
            (rows * n, vocabulary), float, logits after each node, padded nodes and empty lanes included; they
            hold until the next run.
        """
        assert self._captured is not None
        self._take(packed)
        self._captured.replay()
        return self.logits

    def _take(self, packed: Tensor) -> None:
        """Writes the trees to their fixed address. Slots that move may be missing, and then none move."""
        given, words = self._given, self._trees.numel()
        if len(packed) not in (words, len(given)):
            raise ValueError(f"{len(packed)} words for a pass that reads {words} or {len(given)}")
        given[: len(packed)].copy_(packed)
        if len(packed) < len(given):
            given[words:].zero_()


def stage(cache: SpeculativeCache, nodes: int) -> None:
    """Counts nodes that were written after the committed text of each layer."""
    for layer in cache.attention_layers:
        if layer.is_initialized:
            layer.staged = nodes
