"""Chooses, tries and drops the captured passes of a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import TreeAttention, TreeInputs, packed_words
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.graph.arena import PAGE, Arena, layer_shapes, lies_on_one_device, slot_bytes
from retrieval_draft.engine.graph.attention import can_attend_to_trees
from retrieval_draft.engine.graph.captured import CapturedCalls, CudaGraph, TapeGraph
from retrieval_draft.engine.graph.fixed_pass import Call, FixedPass, Summarise, stage
from retrieval_draft.engine.graph.model_prints import model_print
from retrieval_draft.engine.graph.tree_rows import TreeRows

__all__ = ["AUTO", "NODES", "ROW_NODES", "GraphPasses", "graph_kind", "row_sizes"]

NODES = (1, 8, 16, 32, 64, 128, 256)
"""Sizes of trees that passes are captured for."""

ROW_NODES = (1, 4, 8, 16, 32, 64)
"""Sizes of trees, all of one size, in passes over several rows."""

_MOST_TOKENS = 512
"""Tokens of a pass over several rows, padding included, beyond which padding costs more than launches."""

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


def row_sizes(rows: int) -> tuple[int, ...]:
    """Sizes of trees in captured passes over `rows` rows, ascending; none for more rows than these take.

    Example:
        8 rows: 1, 4, 8, 16, 32 and 64 tokens each
    """
    if rows == 1:
        return NODES
    return tuple(size for size in ROW_NODES if _lanes(rows) * size <= _MOST_TOKENS)


def _lanes(rows: int) -> int:
    """Rows of a captured pass for so many: the next power of two."""
    return 1 << (rows - 1).bit_length()


class GraphPasses:
    """Captured passes over trees, of one request or of all rows of a batch.

    Caches work in their memory, a lane each, from their first tree on. Each pass is tried on two trees a row,
    after texts of different lengths, before it is used. Where anything fails, passes are eager, for a reason
    that is kept, and logged once; what fails with several rows leaves single ones captured.

    Args:
        model: The model.
        device: Of its inputs.
        windows: Layer types with their windows.
        kind: "cuda" or "tape".
        eager: The passes that the captured ones replace: takes caches and a tree for each; the nodes are
            staged.
        call: The model, with attention that reads all of a cache under a mask.
        agrees: Whether logits, (n, vocabulary), are those of an eager pass but for rounding.
        vocabulary: Token ids.
        max_positions: Of a text; None for any number.

    Attributes:
        reason: The reason for eager passes; None where they are captured.
        rows_reason: The reason for eager passes over several rows; None where they are captured.
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
        eager: Callable[[Sequence[SpeculativeCache], Sequence[TreeInputs]], Tensor],
        call: Call,
        agrees: Callable[[Tensor, Tensor], bool],
        vocabulary: int,
        max_positions: int | None,
    ) -> None:
        self._model, self._device, self._windows, self._kind = model, device, dict(windows), kind
        self._eager, self._call, self._agrees = eager, call, agrees
        self._vocabulary, self._max_positions = vocabulary, max_positions
        self._arena: Arena | None = None
        self._rows = TreeRows(device)
        self._passes: dict[tuple[int, int, int], FixedPass] = {}
        self._print: int | None = None
        self._is_checked = False
        self._changes = 0
        self._summarise: Summarise | None = None
        self._draw_words = 0
        self._summary_key: Hashable = None
        self._last: FixedPass | None = None
        self._pool: Any = None
        self._limit: int | None = None
        self._is_short = self._is_out_of_memory = False
        self.reason: str | None = None
        self.rows_reason: str | None = None
        self.captures = self.replays = 0
        self.largest = 64
        self.by_tree = can_attend_to_trees(model.dtype, device)
        self._reads_masks = False

    def summarised(self, key: Hashable, summarise: Summarise, draw_words: int) -> None:
        """Sets what captured passes make of their logits for the host.

        Args:
            key: Tells it from others.
            summarise: Makes it.
            draw_words: Words for draws that each tree has.
        """
        if key != self._summary_key:
            self._forget()
            self._summary_key, self._summarise, self._draw_words = key, summarise, draw_words

    def summary_of(self, logits: Tensor) -> Tensor | None:
        """The result of `summarised` for the logits of the last pass, (n, columns); None for any others."""
        return self._last.summary if self._last is not None and self.made(logits) else None

    def made(self, logits: Tensor) -> bool:
        """True for the logits of the last captured pass."""
        return self._last is not None and self._last.logits is logits

    @property
    def hidden(self) -> Tensor | None:
        """(n, d). States that draft sources read in the last pass; they hold until the next."""
        return None if self._last is None else self._last.hidden

    @property
    def nbytes(self) -> int:
        """Bytes of the memory for keys and values."""
        return 0 if self._arena is None else self._arena.nbytes

    def holds(self, cache: Any) -> bool:
        """True for a cache that has no memory but that of passes."""
        arena = self._arena
        return arena is not None and any(arena.holds(cache, lane) for lane in range(arena.rows))

    def limit(self, nbytes: int | None) -> None:
        """Limits the memory for keys and values; None for no limit.

        Caches leave it where it is larger, and where it may not grow with a text, which continues in memory
        of its own. Then nothing is taken until the next call.
        """
        self._limit = nbytes
        if nbytes is not None and self.nbytes > nbytes:
            self._give_back()
            self._limit = 0

    def sizes(self, rows: int) -> tuple[int, ...]:
        """Sizes of trees in captured passes over `rows` rows, ascending; none where those are eager."""
        if self.reason is not None or (rows > 1 and self.rows_reason is not None):
            return ()
        return row_sizes(rows)

    def recheck(self) -> None:
        """Has the next pass look whether the model has changed, as before each request."""
        self._is_checked = False

    def release(self, cache: Any) -> None:
        """Moves a cache out of the memory of passes, so that others may keep it."""
        if self._arena is not None and isinstance(cache, SpeculativeCache):
            self._arena.release(cache)

    def verify(self, cache: Any, inputs: TreeInputs) -> Tensor | None:
        """One captured pass over a tree, whose nodes stay staged in the cache; the path before is committed.

        Returns:
            (n, vocabulary), float, logits after each node, padded nodes included, which hold until the next
            pass; None, and nothing else has changed, where an eager pass has to do.
        """
        packed, nodes = inputs.packed, inputs.input_ids.shape[1]
        if packed is None or not isinstance(cache, SpeculativeCache) or nodes not in NODES:
            inputs.settle()
            return None
        try:
            found = self._known(1, nodes, [cache], [inputs])
            if found is None:
                inputs.settle()
                packed = packed[: packed_words(nodes) + self._draw_words]
                # Eager passes work in this memory too: paths move in two launches for all layers.
                holds = not self._is_out_of_memory and self._holds([cache], 1, _length(cache) + nodes + 1)
                found = self._found(1, nodes, [cache]) if holds and self._is_ready() else None
        except Exception as error:  # a model's own code raises anything
            self._failed(error, 1)
            found = None
        if found is not None:
            return self._replayed(found, [cache], [inputs], packed)
        inputs.settle()
        return None

    def begin_rows(self, caches: Sequence[Any], lengths: Sequence[int], nodes: int) -> TreeRows | None:
        """Moves the caches of several rows into lanes of their own, and makes room for their trees.

        Args:
            caches: Of all rows; their paths need not be committed yet.
            lengths: Tokens of each that will be committed when the pass is made.
            nodes: Of the largest tree.

        Returns:
            Empty, to be packed and sent; None where the rows have to be prepared one by one.
        """
        rows = _lanes(len(caches))
        size = next((each for each in row_sizes(rows) if each >= nodes), None)
        if size is None or not all(isinstance(cache, SpeculativeCache) for cache in caches):
            return None
        try:
            if self.rows_reason is not None or not self._is_ready():
                return None
            # A cache moves with the nodes of its last pass, which are still staged.
            held = [
                _length(cache) + max(layer.staged for layer in cache.attention_layers) for cache in caches
            ]
            if not self._holds(caches, rows, max(max(lengths) + size + 1, *held)):
                return None
            assert self._arena is not None
            lanes = self._arena.assign(caches, rows)
            of_caches = dict(zip(map(id, caches), lanes, strict=True))
            self._rows.begin(rows, size, of_caches, self._draw_words)
        except Exception as error:
            self._failed(error, rows)
            return None
        return self._rows

    def send_rows(self, trees: TreeRows) -> bool:
        """Copies packed trees, and the slots of paths that move, to the device; False where that fails."""
        try:
            trees.send()
        except Exception as error:
            self._failed(error, trees.rows)
            return False
        return True

    def verify_rows(self, caches: Sequence[Any], inputs: Sequence[TreeInputs]) -> Tensor | None:
        """One captured pass over the trees of several rows, whose nodes stay staged in their caches.

        The paths before are committed.

        Args:
            caches: Of the rows.
            inputs: Their trees, of one `begin_rows`.

        Returns:
            (rows * n, vocabulary), float, logits after each node, lane by lane, padded nodes and empty lanes
            included, which hold until the next pass; None, and nothing else has changed, where eager passes
            have to do.
        """
        trees, sent = self._rows, None
        try:
            found = None
            if self._has_lanes(caches, inputs):
                found, sent = self._known(trees.rows, trees.nodes, caches, inputs), trees.sent
                if found is None:
                    for given in inputs:
                        given.settle()
                    found, sent = self._found(trees.rows, trees.nodes, caches), trees.packed.flatten()
        except Exception as error:  # a model's own code raises anything
            self._failed(error, trees.rows)
            found = None
        if found is not None and sent is not None:
            return self._replayed(found, caches, inputs, sent)
        for given in inputs:
            given.settle()
        return None

    def _has_lanes(self, caches: Sequence[Any], inputs: Sequence[TreeInputs]) -> bool:
        """True if these caches, and no others, work in the lanes that their trees were packed for."""
        trees, arena = self._rows, self._arena
        if self.rows_reason is not None or not self._is_ready() or arena is None:
            return False
        lanes = [given.lane[1] if given.lane and given.lane[0] is trees else None for given in inputs]
        for cache, lane in zip(caches, lanes, strict=True):
            if lane is None or not arena.holds(cache, lane):
                return False
        # A row may have failed meanwhile; its lane is about to be written.
        arena.vacate(lane for lane in range(trees.rows) if lane not in lanes)
        return True

    def _known(
        self,
        rows: int,
        nodes: int,
        caches: Sequence[SpeculativeCache],
        inputs: Sequence[TreeInputs],
    ) -> FixedPass | None:
        """The pass that was captured for trees of this size, where the caches may stay as they are.

        Paths may wait to be committed, since nothing is read but by the pass, which moves them.
        """
        arena = self._arena
        if arena is None or self._is_out_of_memory or (rows == 1 and not arena.holds(caches[0])):
            return None
        lengths = [_length(cache) + given.waiting for cache, given in zip(caches, inputs, strict=True)]
        needed = max(lengths) + nodes + 1
        if needed > arena.slots or not self._is_ready():
            return None
        return self._passes.get((rows, nodes, self._slots(needed, arena.slots)))

    def _replayed(
        self,
        found: FixedPass,
        caches: Sequence[SpeculativeCache],
        inputs: Sequence[TreeInputs],
        packed: Tensor,
    ) -> Tensor:
        """Logits of a captured pass, which has moved the paths that wait to be committed."""
        self._last = found
        self.replays += 1
        logits = found.run(packed)
        for cache, given in zip(caches, inputs, strict=True):
            given.settle(in_pass=True)
            stage(cache, found.nodes)
        return logits

    def _is_ready(self) -> bool:
        """False where no pass may be captured or replayed now."""
        if not self._is_checked:
            self._check()
        return self.reason is None and not torch.is_autocast_enabled(self._device.type)

    def _holds(self, caches: Sequence[SpeculativeCache], rows: int, needed: int) -> bool:
        """Has memory for `rows` caches of `needed` slots, those of one row moved in; False without it."""
        fits, slots = False, 0 if self._arena is None else self._arena.slots
        new = caches
        if self._arena is not None and needed <= slots and rows <= self._arena.rows:
            if rows == 1 and self._arena.holds(caches[0], 0):
                return True
            new = [cache for cache in caches if not self.holds(cache)]
            fits = all(map(self._arena.fits, new))
        if not all(map(lies_on_one_device, new)):
            return False
        if not fits:
            made = self._arena_for(caches, rows, needed)
            if made is None:
                if self._limit is not None and 0 < slots < needed:
                    self._give_back()
                    self._limit = 0
                return False
            former, self._arena = self._arena, made
            if former is not None:
                # One that stayed would keep the memory of all lanes.
                with suppress(torch.OutOfMemoryError):
                    former.vacate_all_but(caches)
        assert self._arena is not None
        if rows == 1:
            self._arena.assign(caches, 1)
        return True

    def _arena_for(self, caches: Sequence[SpeculativeCache], rows: int, needed: int) -> Arena | None:
        """New memory for captured passes, which have to be captured anew; None where there is too little."""
        some = caches[0]
        if not all(layer_shapes(cache) == layer_shapes(some) for cache in caches):
            return None
        # The room in a cache's own memory tells how long its text may become.
        own = [cache for cache in caches if cache.mover is None]
        expected = max((layer.capacity for cache in own for layer in cache.attention_layers), default=0)
        slots = max(needed, expected + NODES[-1])
        if self._arena is None:
            slots, most, is_used = max(slots, self._fewest_slots(some) // rows), rows, False
        else:
            before = self._arena.slots
            slots = max(slots, before * 3 // 2 if needed > before else before)
            most = max(rows, self._arena.rows)
            is_used = any(map(self._arena.owner, range(self._arena.rows)))
        for count, each in dict.fromkeys([(most, slots), (most, needed), (rows, slots), (rows, needed)]):
            each = -(-each // PAGE) * PAGE
            if self._has_room(each * count * slot_bytes(some), count, is_used):
                self._forget()
                if not is_used:
                    self._arena = None  # so that it is free before there is another
                return Arena(some, each, count)
        if not self._is_short:
            self._is_short = True
            _log.warning(
                "Passes over %d rows of up to %d tokens of %s are made anew each time: too little memory",
                rows,
                needed,
                type(self._model).__name__,
            )
        return None

    def _has_room(self, nbytes: int, rows: int, is_beside: bool) -> bool:
        """True if new memory of this size stays within the limit, and for several rows the device's.

        Args:
            nbytes: Its size.
            rows: Its lanes.
            is_beside: Whether the present memory stays until caches have moved.
        """
        held = self.nbytes
        if self._limit is not None and nbytes + (held if is_beside else 0) > self._limit:
            return False
        if rows == 1 or self._device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return 2 * nbytes <= free + unused + (0 if is_beside else held)

    def _found(self, rows: int, nodes: int, caches: Sequence[SpeculativeCache]) -> FixedPass | None:
        """The pass for trees of this size; None where it cannot be had."""
        assert self._arena is not None
        needed = max(cache.get_seq_length() for cache in caches) + nodes + 1
        keys = self._slots(needed, self._arena.slots)
        return self._passes.get((rows, nodes, keys)) or self._tried(rows, nodes, keys, caches)

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
            self.reason = self.rows_reason = None
            self._is_out_of_memory = False
            self.by_tree = can_attend_to_trees(self._model.dtype, self._device)
            self._reads_masks = False
            if self._changes > _MOST_CHANGES:
                self.reason = "the model is another one at each request"
        self._print, self._is_checked = now, True

    def _tried(
        self, rows: int, nodes: int, keys: int, caches: Sequence[SpeculativeCache]
    ) -> FixedPass | None:
        """A new pass that agrees with eager ones; None where it does not, or cannot be tried here."""
        last = max(cache.get_seq_length() + cache.shift for cache in caches) + 2 + nodes.bit_length()
        if self._max_positions is not None and last > self._max_positions:
            return None
        fits = nodes < self.largest and max(map(_length, caches)) + self.largest + 1 <= keys
        if self._kind == "cuda" and rows == 1 and fits and (1, self.largest, keys) not in self._passes:
            self._tried(1, self.largest, keys, caches)
            if self.reason is not None:
                return None
        try:
            made = self._compared(rows, nodes, keys, caches)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of compiling the kernel, or of the model's own code
            if not self.by_tree:
                raise
            self._read_masks(f"{type(error).__name__}: {error}")
            made = self._compared(rows, nodes, keys, caches)
        if made is False and self.by_tree:
            self._read_masks(f"a pass over {nodes} tokens gave other logits")
            made = self._compared(rows, nodes, keys, caches)
        if made is False:
            self._give_up(
                f"the replay of a pass over {nodes} tokens gave other logits than an eager one", rows
            )
        if not made:
            return None
        self._passes[rows, nodes, keys] = made
        self._reads_masks = made.reads_masks
        return made

    def _compared(
        self, rows: int, nodes: int, keys: int, caches: Sequence[SpeculativeCache]
    ) -> FixedPass | Literal[False] | None:
        """A new pass; False where its logits are not those of eager passes, None where these are NaN.

        The caches are afterwards what they were before.
        """
        assert self._arena is not None
        arena = self._arena
        lengths = [_length(cache) for cache in caches]
        lanes = [next(lane for lane in range(rows) if arena.holds(cache, lane)) for cache in caches]
        by_cache = dict(zip(map(id, caches), lanes, strict=True))
        made = FixedPass(
            rows,
            nodes,
            keys,
            arena,
            self._windows,
            self._model.dtype,
            self._summarise,
            self._draw_words,
            self.by_tree,
        )
        trial = _Trial(TreeRows(self._device), [self._masks() for _ in caches])
        agrees, is_told = True, True
        try:
            for seed in range(2):
                finite = 0
                inputs = trial.inputs(rows, nodes, caches, by_cache, self._vocabulary, self._draw_words, seed)
                expected = self._eager(caches, inputs)
                for cache in caches:
                    cache.drop()
                if not seed:
                    made.capture(self._call, caches[0], trial.trees.sent, self._recorder())
                    self.captures += 1
                else:
                    made.run(trial.trees.sent)
                for cache in caches:
                    stage(cache, nodes)
                for row, (cache, lane) in enumerate(zip(caches, lanes, strict=True)):
                    wanted = expected[row * nodes : (row + 1) * nodes]
                    if not bool(wanted.isfinite().all()):
                        continue  # a row of NaN tells nothing of the others
                    finite += 1
                    agrees = agrees and self._agrees(made.logits[lane * nodes : (lane + 1) * nodes], wanted)
                    if not seed:
                        cache.commit(None, 1, 1)
                is_told = is_told and finite > 0
                for cache in caches:
                    cache.drop()
        finally:
            for cache, length in zip(caches, lengths, strict=True):
                cache.drop()
                cache.keep(length)
        if not agrees:
            return False
        return made if is_told else None

    def _masks(self) -> TreeAttention:
        return TreeAttention(self._windows, self._model.dtype, self._device, NODES)

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

    def _failed(self, error: Exception, rows: int) -> None:
        """Makes passes eager after an error; their memory goes back where there is too little."""
        self._give_up(f"{type(error).__name__}: {error}", rows)
        if isinstance(error, torch.OutOfMemoryError):
            self._is_out_of_memory = True
            self._give_back()

    def _give_up(self, reason: str, rows: int) -> None:
        name = type(self._model).__name__
        if rows == 1:
            self._forget()
            self.reason = reason
            _log.warning("Passes of %s are made anew each time: %s", name, reason)
        else:
            self._passes = {key: made for key, made in self._passes.items() if key[0] == 1}
            self._last, self.rows_reason = None, reason
            _log.warning("Passes over several rows of %s are made anew each time: %s", name, reason)

    def _give_back(self) -> None:
        """Moves all caches out, and drops all passes with their memory.

        Caches for which there is no other memory stay there until they end.
        """
        self._forget()
        arena, self._arena = self._arena, None
        if arena is not None:
            with suppress(torch.OutOfMemoryError):
                arena.clear()

    def _forget(self) -> None:
        self._passes, self._last = {}, None
        self._pool = None  # of graphs that are gone


class _Trial(NamedTuple):
    """Memory for the trees that a pass is tried on.

    Attributes:
        trees: Packs them.
        masks: Make masks for eager passes, one for each row.
    """

    trees: TreeRows
    masks: Sequence[TreeAttention]

    def inputs(
        self,
        rows: int,
        nodes: int,
        caches: Sequence[SpeculativeCache],
        lanes: Mapping[int, int],
        vocabulary: int,
        draw_words: int,
        seed: int,
    ) -> list[TreeInputs]:
        """A tree of random tokens after the text of each cache."""
        rng = np.random.default_rng(seed)
        self.trees.begin(rows, nodes, lanes, draw_words)
        for cache in caches:
            self.trees.pack(cache, _random_tree(nodes, vocabulary, rng), _length(cache))
        self.trees.send()
        pairs = zip(caches, self.masks, strict=True)
        return [self.trees.inputs(cache, masks) for cache, masks in pairs]


def _random_tree(nodes: int, vocabulary: int, rng: np.random.Generator) -> DraftTree:
    parents = np.array([(node - 1) // _BRANCHES if node else -1 for node in range(nodes)], np.int32)
    depths = np.zeros(nodes, np.int32)
    for node in range(1, nodes):
        depths[node] = depths[parents[node]] + 1
    tokens = rng.integers(0, vocabulary, nodes).astype(np.int32)
    ones = np.ones(nodes, np.float32)
    return DraftTree(tokens, parents, depths, ones, ones, np.zeros(nodes, np.int64))


def _length(cache: SpeculativeCache) -> int:
    return int(cache.get_seq_length())
