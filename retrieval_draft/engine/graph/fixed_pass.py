"""One pass over trees of one padded size, with inputs, masks and keys at fixed addresses."""

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

__all__ = ["FixedPass", "tree_masks"]

Call = Callable[[Any, Tensor, Tensor, Mask], tuple[Tensor, Tensor | None]]
"""The model: takes a cache, token ids, positions, (1, n) each, and a mask; gives logits, (n, vocabulary), and
the inputs of its output head, (n, d)."""


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
        length: int64, shape (1,). Committed tokens.
        depths: int64, shape (n,). Of the nodes.
        hidden: bool, shape (n, n). [i, j] true where node i must not see node j; None for a root alone.
        columns: int64, shape (keys,). 0, 1, 2, ...
        dtype: Of the masks.

    Returns:
        Additive, shape (1, 1, n, keys), for each layer type.
    """
    nodes = len(depths)
    node = columns - length
    inside = node.clamp(0, nodes - 1)
    unseen = (node >= nodes)[None]
    if hidden is not None:
        unseen = unseen | (hidden.index_select(1, inside) & (node >= 0))
    lowest = torch.finfo(dtype).min
    out = {}
    for kind, window in windows.items():
        missing = unseen.expand(nodes, -1)
        if window is not None:
            depth = torch.where(node < 0, node, depths.index_select(0, inside))
            missing = missing | (depths[:, None] - depth[None] >= window)
        mask = torch.zeros(missing.shape, dtype=dtype, device=missing.device)
        out[kind] = mask.masked_fill_(missing, lowest)[None, None]
    return out


class _SlotCache(Cache):
    """Writes keys and values to slots that a tensor names, and returns all slots."""

    takes_states_alone = True
    """As of `SpeculativeCache`."""

    def __init__(
        self, cache: SpeculativeCache, states: list[tuple[Tensor, Tensor] | None], slots: Tensor
    ) -> None:
        super().__init__(layers=cache.layers)
        of_layers = iter(states)
        own = set(cache.attention_layers)
        self._states = [next(of_layers) if layer in own else None for layer in cache.layers]
        self._slots = slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """One layer's keys and values, (1, heads, keys, dim) each, after new ones were written."""
        states = self._states[layer_idx]
        assert states is not None, "a layer that had no keys before has some now"
        for held, new in zip(states, (key_states, value_states), strict=True):
            held.index_copy_(-2, self._slots, new)
        return states


class FixedPass:
    """A captured pass.

    Args:
        nodes: Of the padded tree.
        keys: Slots that it reads; texts and trees must fit.
        arena: Memory of the cache.
        windows: Layer types with their windows.
        dtype: Of the masks.
        summarise: Makes of logits what the host reads of them, (n, columns), in the same capture.
        by_tree: Whether attention may read the tree instead of masks.

    Attributes:
        logits: (n, vocabulary). Written by `run`.
        hidden: (n, d). States that draft sources read, written by `run`; None where none are read.
        summary: As `summarise` made it, written by `run`.
        reads_masks: Whether a layer read a mask over all slots.
    """

    def __init__(
        self,
        nodes: int,
        keys: int,
        arena: Arena,
        windows: Mapping[str, int | None],
        dtype: torch.dtype,
        summarise: Callable[[Tensor], Tensor] | None,
        by_tree: bool,
    ) -> None:
        self.nodes, self.keys = nodes, keys
        self._arena, self._windows, self._dtype, self._summarise = arena, windows, dtype, summarise
        self._by_tree = by_tree
        device = arena.tensors[0].device
        self._given = torch.zeros(packed_words(nodes), dtype=torch.int64, device=device)
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
            cache: Works in the arena.
            packed: As for `run`.
            by: Makes the record.
        """
        self._given.copy_(packed)
        nodes = self.nodes
        ids, positions, depths = self._given[: 3 * nodes].view(3, 1, nodes).unbind()
        length = self._given[3 * nodes : 3 * nodes + 1]
        hidden = None
        if nodes > 1:
            bits = self._given[3 * nodes + 1 :].view(torch.bool)
            hidden = bits[: nodes * nodes].view(nodes, nodes)
        states = self._arena.keys_and_values(self.keys)

        def calls() -> tuple[Tensor, Tensor | None, Tensor | None]:
            slots = self._columns[:nodes] + length
            masks = tree_masks(self._windows, length, depths[0], hidden, self._columns, self._dtype)
            mask: Mask = {**masks} if len(masks) > 1 else next(iter(masks.values()))
            windows = {masks[kind].data_ptr(): window for kind, window in self._windows.items()}
            tree = PassTree(length, depths[0], hidden, windows)
            with attending_to(tree) if self._by_tree else nullcontext():
                logits, inputs = call(_SlotCache(cache, states, slots), ids, positions, mask)
            self.reads_masks = tree.reads < len(cache.attention_layers)
            return logits, inputs, None if self._summarise is None else self._summarise(logits)

        self.logits, self.hidden, self.summary = by.capture(calls)
        self._captured = by

    def run(self, cache: SpeculativeCache, packed: Tensor) -> Tensor:
        """One pass over a tree, whose nodes are staged in the cache.

        Args:
            cache: Works in the arena.
            packed: The tree: `TreeInputs.packed`.

        Returns:
            (n, vocabulary), float, logits after each node, padded nodes included; they hold until the next
            run.
        """
        assert self._captured is not None
        self._given.copy_(packed)
        self._captured.replay()
        stage(cache, self.nodes)
        return self.logits


def stage(cache: SpeculativeCache, nodes: int) -> None:
    """Counts nodes that were written after the committed text of each layer."""
    for layer in cache.attention_layers:
        if layer.is_initialized:
            layer.staged = nodes
