"""Chooses, tries and drops the captured passes of a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import TreeAttention, TreeInputs
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.graph.arena import PAGE, Arena, lies_on_one_device, slot_bytes
from retrieval_draft.engine.graph.attention import can_attend_to_trees
from retrieval_draft.engine.graph.captured import CapturedCalls, CudaGraph, TapeGraph
from retrieval_draft.engine.graph.fixed_pass import Call, FixedPass, stage
from retrieval_draft.engine.graph.model_prints import model_print

__all__ = ["AUTO", "NODES", "GraphPasses", "graph_kind"]

NODES = (1, 8, 16, 32, 64, 128, 256)
"""Sizes of trees that passes are captured for."""

AUTO = {"cuda": "cuda"}
""""auto" by type of device: "cuda" or "tape"; eager passes on others."""

_WEIGHTS_PER_ARENA = 32
"""An arena takes at least this part of the weights' memory: texts that outgrow it cost all passes."""

_FEW_SLOTS, _MORE_SLOTS = 4096, 4
"""Slots of a pass whose attention reads trees, which costs nothing for those that are not filled, and the
factor to the next number."""

_MOST_CHANGES = 16
"""Changes of a model, with captured passes in between, after which it is taken to change all the time."""

_BRANCHES = 4
"""Children of a node in the trees that captured passes are tried on."""

_log = logging.getLogger("retrieval_draft")


def graph_kind(setting: str, device: torch.device) -> str | None:
    """The kind of captured passes for a setting of `DraftConfig.graphs`: "cuda", "tape", or None for none."""
    kind = AUTO.get(device.type) if setting == "auto" else setting
    return None if kind == "off" else kind


class GraphPasses:
    """Captured passes over trees of a request that is alone in its pass.

    One cache at a time works in their memory, from its first tree on. Each pass is tried on two trees, after
    texts of different lengths, before it is used. Where anything fails, passes are eager, for a reason
    that is kept, and logged once.

    Args:
        model: The model.
        device: Of its inputs.
        windows: Layer types with their windows.
        kind: "cuda" or "tape".
        eager: The pass that the captured ones replace: takes a cache and a tree; the nodes are staged.
        call: The model, with attention that reads all of a cache under a mask.
        agrees: Whether logits, (n, vocabulary), are those of an eager pass but for rounding.
        vocabulary: Token ids.
        max_positions: Of a text; None for any number.

    Attributes:
        reason: The reason for eager passes; None where they are captured.
        captures: Passes captured so far.
        replays: Passes replayed so far.
        largest: The size that is captured first where memory is shared, since smaller ones fit into its.
        by_tree: Whether attention reads trees by a kernel for them; else masks.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        windows: Mapping[str, int | None],
        kind: str,
        eager: Callable[[SpeculativeCache, TreeInputs], Tensor],
        call: Call,
        agrees: Callable[[Tensor, Tensor], bool],
        vocabulary: int,
        max_positions: int | None,
    ) -> None:
        self._model, self._device, self._windows, self._kind = model, device, dict(windows), kind
        self._eager, self._call, self._agrees = eager, call, agrees
        self._vocabulary, self._max_positions = vocabulary, max_positions
        self._trial = TreeAttention(self._windows, model.dtype, device, NODES)
        self._arena: Arena | None = None
        self._passes: dict[tuple[int, int], FixedPass] = {}
        self._print: int | None = None
        self._is_checked = False
        self._changes = 0
        self._summarise: Callable[[Tensor], Tensor] | None = None
        self._summary_key: Hashable = None
        self._last: FixedPass | None = None
        self._pool: Any = None
        self.reason: str | None = None
        self.captures = self.replays = 0
        self.largest = 64
        self.by_tree = can_attend_to_trees(model.dtype, device)
        self._reads_masks = False

    def summarised(self, key: Hashable, summarise: Callable[[Tensor], Tensor]) -> None:
        """Sets what captured passes make of their logits for the host; `key` tells it from others."""
        if key != self._summary_key:
            self._forget()
            self._summary_key, self._summarise = key, summarise

    def summary_of(self, logits: Tensor) -> Tensor | None:
        """The result of `summarised` for the logits of the last pass, (n, columns); None for any others."""
        last = self._last
        return last.summary if last is not None and last.logits is logits else None

    @property
    def hidden(self) -> Tensor | None:
        """(n, d). States that draft sources read in the last pass; they hold until the next."""
        return None if self._last is None else self._last.hidden

    def recheck(self) -> None:
        """Has the next pass look whether the model has changed, as before each request."""
        self._is_checked = False

    def release(self, cache: Any) -> None:
        """Moves a cache out of the memory of passes, so that others may keep it."""
        if self._arena is not None and isinstance(cache, SpeculativeCache):
            self._arena.release(cache)

    def verify(self, cache: Any, inputs: TreeInputs) -> Tensor | None:
        """One captured pass over a tree, whose nodes stay staged in the cache.

        Returns:
            (n, vocabulary), float, logits after each node, padded nodes included, which hold until the next
            pass; None, and nothing has changed, where an eager pass has to do.
        """
        packed, nodes = inputs.packed, inputs.input_ids.shape[1]
        if packed is None or not isinstance(cache, SpeculativeCache) or nodes not in NODES:
            return None
        try:
            if not self._holds(cache, nodes):
                return None
            if not self._is_checked:
                self._check()
            if self.reason is not None or torch.is_autocast_enabled(self._device.type):
                return None
            length = cache.get_seq_length()
            assert self._arena is not None
            keys = self._slots(length + nodes + 1, self._arena.slots)
            found = self._passes.get((nodes, keys)) or self._tried(nodes, keys, cache)
            if found is None:
                return None
        except Exception as error:  # a model's own code raises anything
            self._give_up(f"{type(error).__name__}: {error}")
            return None
        self._last = found
        self.replays += 1
        return found.run(cache, packed)

    def _holds(self, cache: SpeculativeCache, nodes: int) -> bool:
        """Moves a cache into the arena, with room for a tree; False where it cannot have it."""
        arena, needed = self._arena, cache.get_seq_length() + nodes + 1
        if arena is not None and needed <= arena.slots and arena.holds(cache):
            return True
        owner = None if arena is None else arena.owner
        if (owner is not None and owner is not cache) or not lies_on_one_device(cache):
            return False
        if arena is None or needed > arena.slots or not arena.fits(cache):
            expected = max(layer.capacity for layer in cache.attention_layers) + NODES[-1]
            slots = max(
                needed, expected, self._fewest_slots(cache) if arena is None else arena.slots * 3 // 2
            )
            self._forget()
            self._arena = None if owner is None else arena
            arena = Arena(cache, -(-slots // PAGE) * PAGE)
        arena.take(cache)
        self._arena = arena
        return True

    def _slots(self, needed: int, slots: int) -> int:
        """The next of few numbers of keys, or all there are."""
        keys, factor = (_FEW_SLOTS, _MORE_SLOTS) if self.by_tree and not self._reads_masks else (PAGE, 2)
        while keys < needed:
            keys *= factor
        return min(keys, slots)

    def _fewest_slots(self, cache: SpeculativeCache) -> int:
        weights: int = sum(each.nbytes for each in self._model.parameters())
        slots = weights // _WEIGHTS_PER_ARENA // slot_bytes(cache)
        return slots if self._max_positions is None else min(slots, self._max_positions)

    def _check(self) -> None:
        """Drops passes that were captured with the model in another state."""
        now = model_print(self._model)
        if self._print is not None and now != self._print:
            self._forget()
            self._changes += 1
            self.reason = None
            self.by_tree = can_attend_to_trees(self._model.dtype, self._device)
            self._reads_masks = False
            if self._changes > _MOST_CHANGES:
                self.reason = "the model is another one at each request"
        self._print, self._is_checked = now, True

    def _tried(self, nodes: int, keys: int, cache: SpeculativeCache) -> FixedPass | None:
        """A new pass that agrees with eager ones; None where it does not, or cannot be tried here."""
        assert self._arena is not None
        length = cache.get_seq_length()
        last = length + cache.shift + 2 + nodes.bit_length()
        if self._max_positions is not None and last > self._max_positions:
            return None
        fits = nodes < self.largest and length + self.largest + 1 <= keys
        if self._kind == "cuda" and fits and (self.largest, keys) not in self._passes:
            self._tried(self.largest, keys, cache)
            if self.reason is not None:
                return None
        try:
            made = self._compared(nodes, keys, cache)
        except Exception as error:  # of compiling the kernel, or of the model's own code
            if not self.by_tree:
                raise
            self._read_masks(f"{type(error).__name__}: {error}")
            made = self._compared(nodes, keys, cache)
        if made is None and self.by_tree:
            self._read_masks(f"a pass over {nodes} tokens gave other logits")
            made = self._compared(nodes, keys, cache)
        if made is None:
            self._give_up(f"the replay of a pass over {nodes} tokens gave other logits than an eager one")
            return None
        self._passes[nodes, keys] = made
        self._reads_masks = made.reads_masks
        return made

    def _compared(self, nodes: int, keys: int, cache: SpeculativeCache) -> FixedPass | None:
        """A new pass; None where its logits are not those of eager passes."""
        assert self._arena is not None
        length = cache.get_seq_length()
        made = FixedPass(
            nodes, keys, self._arena, self._windows, self._model.dtype, self._summarise, self.by_tree
        )
        try:
            tree = self._tree(nodes, cache, 0)
            expected = self._eager(cache, tree)
            cache.drop()
            assert tree.packed is not None
            made.capture(self._call, cache, tree.packed, self._recorder())
            self.captures += 1
            agrees = self._agrees(made.logits, expected)
            stage(cache, nodes)
            cache.commit(None, 1, 1)
            tree = self._tree(nodes, cache, 1)
            expected = self._eager(cache, tree)
            cache.drop()
            assert tree.packed is not None
            agrees = agrees and self._agrees(made.run(cache, tree.packed), expected)
        finally:
            cache.drop()
            cache.keep(length)
        return made if agrees else None

    def _tree(self, nodes: int, cache: SpeculativeCache, seed: int) -> TreeInputs:
        """A tree of random tokens after the text of a cache."""
        parents = np.array([(node - 1) // _BRANCHES if node else -1 for node in range(nodes)], np.int32)
        depths = np.zeros(nodes, np.int32)
        for node in range(1, nodes):
            depths[node] = depths[parents[node]] + 1
        tokens = np.random.default_rng(seed).integers(0, self._vocabulary, nodes).astype(np.int32)
        ones = np.ones(nodes, np.float32)
        tree = DraftTree(tokens, parents, depths, ones, ones, np.zeros(nodes, np.int64))
        return self._trial.prepare(tree, cache.get_seq_length(), None, cache.shift)

    def _recorder(self) -> CapturedCalls:
        if self._kind == "tape":
            return TapeGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(self._device, self._pool)

    def _read_masks(self, reason: str) -> None:
        self._forget()
        self.by_tree = False
        _log.warning("Attention of %s reads masks, not trees: %s", type(self._model).__name__, reason)

    def _give_up(self, reason: str) -> None:
        self._forget()
        self.reason = reason
        _log.warning("Passes of %s are made anew each time: %s", type(self._model).__name__, reason)

    def _forget(self) -> None:
        self._passes, self._last = {}, None
