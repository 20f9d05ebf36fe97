"""A target model whose every token has the same bits, drafted or not: `DraftConfig(exact="bitwise")`.

A token's keys, values and logits are a function of the tokens up to it, for these reasons:

1. **One shape.** Prompts, plain steps and trees are passes over `WIDTH` tokens, padded, so that every product
   of the model has one shape and the library one way to compute it. A prompt is a row of chains; where one
   ends does not matter, nor which logits are wanted, nor which part was found in a cache.
2. **One row at a time.** Linear layers, norms, activations and rotary factors compute a row from that row. A
   test (`row_invariance`) shows that the library keeps to this in bits, for any index of the row and any
   other rows, with the threads that torch has then. Experts are passed token by token; other ways to group
   tokens have shapes that depend on the neighbours, and are refused.
3. **Attention by position** (`position_attention`): the order of keys, and where sums are cut, follow from
   positions alone.
4. **Moves are copies.** An accepted node's keys and values move to the slot of its position as they are;
   those of rejected nodes are written over, or weigh an exact zero.
5. **Choices read one row**: the best token, or a draw that depends on seed and position, from its logits.

Rows of a batch are passed one after another, each in memory of its own, and so have the bits that they have
alone. Texts are equal on one machine, with the same libraries, threads and attention implementation.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import TreeAttention, TreeInputs, packed_words
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.graph.arena import PAGE, Arena, PassMemory, lies_on_one_device, slot_bytes
from retrieval_draft.engine.graph.bitwise_pass import WIDTH, BitwisePass
from retrieval_draft.engine.graph.captured import CapturedCalls, CudaGraph, TapeGraph
from retrieval_draft.engine.graph.graph_passes import graph_kind
from retrieval_draft.engine.graph.model_prints import model_print
from retrieval_draft.engine.graph.position_attention import position_attention
from retrieval_draft.engine.logits import Wanted, summary
from retrieval_draft.engine.substitution import loan
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import UnsupportedModelError

__all__ = ["BitwiseTarget"]

_MOST_ROOMS = 8
"""Caches that keep memory of passes at a time; further ones take turns."""

_WEIGHTS_PER_ARENA = 32
"""An arena takes at least this part of the weights' memory: in a larger one passes are captured anew."""

_log = logging.getLogger("retrieval_draft")


class _Room:
    """Memory of one cache at a time, and the passes in it, by their keys and the layers that sources read."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.passes: dict[tuple[int, tuple[int, ...]], BitwisePass] = {}
        self.owner: Callable[[], SpeculativeCache | None] = lambda: None

    def take(self, cache: SpeculativeCache) -> None:
        self.arena.take(cache)
        self.owner = weakref.ref(cache)


class BitwiseTarget(Target):
    """Forward passes of one shape.

    Args:
        model: A causal language model of transformers that can verify trees.
        graphs: As `DraftConfig.graphs`.

    Attributes:
        check: Tests whether bits depend on slots or neighbours, and raises if so. Called before a request
            where the model has changed.

    Raises:
        UnsupportedModelError: The model cannot be passed so.
    """

    shares_passes = False
    width = WIDTH

    def __init__(self, model: PreTrainedModel, graphs: str = "auto") -> None:
        super().__init__(model, "off")
        self._kind = graph_kind(graphs, self.device)
        self.threads = None  # as many as torch has: another number may add up in another order
        if self.rope is not None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has rotary factors that depend on the length of the text.",
                "Leave out exact='bitwise' for this model.",
            )
        self._rooms: list[_Room] = []
        self._shapes: SpeculativeCache | None = None
        self._runs = self.attention_of_row()
        self._summarise: Callable[[Tensor], Tensor] | None = None
        self._summary_key = (-1, -1)
        self._last: BitwisePass | None = None
        self._print: int | None = None
        self._captures = 0
        self._limit: int | None = None
        self._pool: Any = None
        self.check: Callable[[BitwiseTarget], None] | None = None

    @property
    def captures(self) -> int:
        """Passes captured so far."""
        return self._captures

    @property
    def pass_memory(self) -> PassMemory:
        """As of `Target`: what it holds itself."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the memory for keys and values."""
        return sum(room.arena.nbytes for room in self._rooms)

    def holds(self, cache: Any) -> bool:
        """True for a cache that has no memory but that of passes."""
        return any(room.arena.holds(cache) and room.owner() is cache for room in self._rooms)

    def limit(self, nbytes: int | None) -> None:
        """Limits the memory for keys and values, but for that of one cache at a time; None for no limit.

        Caches for which there is none take turns.
        """
        self._limit = nbytes
        self._make_room(0)

    def attention_of_row(self) -> TreeAttention:
        """Inputs for one more request beside others, padded to one size."""
        return TreeAttention(self.windows, self.model.dtype, self.device, (WIDTH,))

    def summarised_for(self, k: int, wanted: Wanted) -> Wanted:
        """As of `Target`, without draws from all logits."""
        self._wanted = self._wanted.joined(Wanted(min(wanted.best, self.vocabulary)))
        key = min(k, self.vocabulary), self._wanted.best
        if self._kind is not None and key != self._summary_key:
            self._forget()
            self._summary_key, self._summarise = key, partial(summary, k=key[0], best=key[1])
        return self._wanted

    def summary_of(self, logits: Tensor) -> Tensor | None:
        """As of `Target`."""
        last = self._last
        return last.summary if last is not None and last.logits is logits else None

    def release(self, cache: Any) -> None:
        """As of `Target`."""
        for room in self._rooms:
            owner = room.owner()
            if owner is not None and owner is cache:
                room.arena.release(owner)
                room.owner = lambda: None

    def prefill_passes(
        self,
        cache: Any,
        prompt: Tensor,
        rows: int,
        chunk: int | Callable[[], int | None] | None = None,
        further: int = 0,
    ) -> Iterator[Tensor | None]:
        """As of `Target`, after `check_now`: each request begins with its prompt."""
        self.check_now()
        yield from super().prefill_passes(cache, prompt, rows, chunk, further)

    def verify(self, cache: Any, inputs: TreeInputs) -> Tensor:
        """As of `Target`."""
        logits = self._pass(cache, inputs)
        if self._watches_hidden:
            hidden = None if self._last is None else self._last.hidden
            self.hidden = None if hidden is None else hidden.clone()
        return logits

    def verify_rows(self, caches: Sequence[Any], inputs: Sequence[TreeInputs]) -> Tensor:
        """As of `Target`: a pass for each request."""
        if len(caches) == 1:
            return self.verify(caches[0], inputs[0])
        # Passes of caches that take turns in one memory write the same logits.
        return self._each(lambda cache, given: self.verify(cache, given).clone(), caches, inputs)

    def _forward(self, cache: Any, ids: Tensor, offset: int, keep: int, whole: int) -> Tensor:
        """Appends text in chains of `WIDTH` tokens; logits of the last `keep`."""
        tokens = ids[0].cpu().numpy().astype(np.int32)
        logits, hidden = [], []
        for begin in range(0, len(tokens), WIDTH):
            part = tokens[begin : begin + WIDTH]
            size = len(part)
            chain = DraftTree(
                tokens=part,
                parents=np.arange(-1, size - 1, dtype=np.int32),
                depths=np.arange(size, dtype=np.int32),
                probs=np.ones(size, np.float32),
                path_probs=np.ones(size, np.float32),
                sources=np.zeros(size, np.int64),
            )
            found = self._pass(cache, self._runs.prepare(chain, offset + begin, None, cache.shift))
            cache.commit(None, size, size)
            first = max(len(tokens) - keep - begin, 0)
            if first < size:
                logits.append(found[first:size].clone())
            states = None if self._last is None else self._last.hidden
            if self._watches_hidden and states is not None:
                hidden.append(states[:size].clone())
        self.hidden = torch.cat(hidden) if hidden else None
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _pass(self, cache: SpeculativeCache, inputs: TreeInputs) -> Tensor:
        """One pass over a tree, whose nodes stay staged in the cache."""
        assert inputs.packed is not None
        if inputs.input_ids.shape[1] != WIDTH:
            raise ValueError(f"A tree has more than {WIDTH} nodes, its root included.")
        packed = inputs.packed[: packed_words(WIDTH)]
        found = self._found(cache, packed)
        logits = found.run(cache, packed)
        self._last = found
        for layer in cache.attention_layers:
            if layer.is_initialized:
                layer.staged = WIDTH
        return logits

    def check_now(self) -> None:
        """Tests the model, unless it is as it was when it was tested last, before an adapter or the like."""
        now = model_print(self.model)
        if now == self._print:
            return
        self._print = now
        self._forget()
        try:
            if self.check is not None:
                self.check(self)
        except Exception:
            self._print = None
            raise

    def _found(self, cache: SpeculativeCache, packed: Tensor) -> BitwisePass:
        """The pass for a cache, which is made where it is the first of its kind."""
        room = self._room(cache)
        keys = PAGE
        while keys < cache.get_seq_length():
            keys *= 2
        keys = min(keys, room.arena.slots)
        kind = keys, self.hidden_states.layers
        found = room.passes.get(kind)
        if found is None:
            found = BitwisePass(
                self._call_by_position, room.arena, keys, self.windows, self.model.dtype, self._summarise
            )
            self._capture(found, cache, packed)
            room.passes[kind] = found
        return found

    def _capture(self, made: BitwisePass, cache: SpeculativeCache, packed: Tensor) -> None:
        if self._kind is not None:
            try:
                made.capture(cache, packed, self._recorder())
                self._captures += 1
                return
            except UnsupportedModelError:
                raise
            except Exception as error:  # of the driver; the calls themselves have the same bits
                self._kind = None
                _log.warning(
                    "Passes of %s are made anew each time: %s: %s",
                    type(self.model).__name__,
                    type(error).__name__,
                    error,
                )
        made.capture(cache, packed, None)

    def _recorder(self) -> CapturedCalls:
        if self._kind == "tape":
            return TapeGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(self.device, self._pool)

    def _room(self, cache: SpeculativeCache) -> _Room:
        """The memory of a cache, with room for one more pass."""
        self._initialise(cache)
        needed = cache.get_seq_length() + WIDTH
        room = next((room for room in self._rooms if room.owner() is cache), None)
        if room is not None and needed <= room.arena.slots:
            if not room.arena.holds(cache):
                room.take(cache)
        elif room is not None:
            larger = self._new_room(cache, room.arena.slots * 3 // 2, needed, room)
            larger.take(cache)
            room.owner = lambda: None  # it has moved on
            self._drop(room)
            room = larger
        else:
            room = self._free_room(cache, needed)
            room.take(cache)
        self._rooms.remove(room)
        self._rooms.append(room)  # the longest unused one is first
        return room

    def _free_room(self, cache: SpeculativeCache, needed: int) -> _Room:
        for room in self._rooms:
            if room.owner() is None and room.arena.slots >= needed and room.arena.fits(cache):
                return room
        if len(self._rooms) >= _MOST_ROOMS:
            unused = self._rooms[0]
            if unused.arena.slots >= needed and unused.arena.fits(cache):
                return unused  # its cache moves out as this one moves in
            self._drop(unused)
        if not lies_on_one_device(cache):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} lies on several devices.",
                "Load it on one, or leave out exact='bitwise'.",
            )
        weights: int = sum(each.nbytes for each in self.model.parameters())
        slots = weights // _WEIGHTS_PER_ARENA // slot_bytes(cache)
        if self.max_positions is not None:
            slots = min(slots, self.max_positions)
        return self._new_room(cache, slots, needed)

    def _new_room(
        self, cache: SpeculativeCache, wanted: int, needed: int, former: _Room | None = None
    ) -> _Room:
        """Memory for a cache, of `wanted` slots, or fewer where the limit allows no more.

        Args:
            cache: Has passed a text; it does not move in yet.
            wanted: Slots, if there is memory for them.
            needed: Slots at least, for which other caches move out if they have to.
            former: The memory that the cache leaves; it is dropped by the caller.
        """
        each, left = slot_bytes(cache), cache.nbytes if former is None else former.arena.nbytes
        expected = max(layer.expected for layer in cache.attention_layers)
        sizes = [_pages(max(slots, needed)) for slots in (wanted, expected, needed)]
        slots = next((slots for slots in sizes if self._has_room(slots * each - left)), sizes[-1])
        self._make_room(slots * each - left, former)
        self._rooms.append(_Room(Arena(cache, slots)))
        return self._rooms[-1]

    def _has_room(self, nbytes: int) -> bool:
        return self._limit is None or self.nbytes + nbytes <= self._limit

    def _make_room(self, nbytes: int, kept: _Room | None = None) -> None:
        """Drops memory, unused and longest unused first, until the limit leaves so much, or there is none.

        Args:
            nbytes: Bytes that are about to be taken, less those that become free.
            kept: Is not dropped.
        """
        for room in sorted(self._rooms, key=lambda room: room.owner() is not None):
            if self._has_room(nbytes):
                return
            if room is not kept:
                self._drop(room)

    def _drop(self, room: _Room) -> None:
        """Drops memory, out of which its cache moves."""
        self._rooms.remove(room)
        owner = room.owner()
        if owner is not None:
            room.arena.release(owner)
        if self._last in room.passes.values():
            self._last = None
        if not any(each.passes for each in self._rooms):
            self._pool = None  # of graphs that are gone

    def _initialise(self, cache: SpeculativeCache) -> None:
        """Gives an empty cache the shapes of its layers."""
        if any(layer.is_initialized for layer in cache.attention_layers):
            return
        if self._shapes is None:
            self._shapes = self.cache(1, keeps_all=True)
            zero = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
            with torch.no_grad():
                self._call(self._shapes, zero, zero, None, 1)
        for layer, like in zip(cache.attention_layers, self._shapes.attention_layers, strict=True):
            if like.is_initialized:
                layer.lazy_initialization(*(states[..., :0, :] for states in like.held()))

    def _call_by_position(
        self, cache: Any, ids: Tensor, positions: Tensor, mask: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The model: its logits, and the states that draft sources read."""
        with self.hidden_states.taken(), position_attention(self.model), _experts_apart(self.model):
            logits = self._call(cache, ids, positions, mask, ids.shape[1])
            states = self.hidden_states.last
        return logits, None if states is None else states[0]

    def _forget(self) -> None:
        self._pool = None  # of graphs that are gone
        for room in self._rooms:
            room.passes = {}
        self._last = None


def _pages(slots: int) -> int:
    return -(-slots // PAGE) * PAGE


@contextmanager
def _experts_apart(model: Any) -> Iterator[None]:
    """Has experts passed token by token, in products of one shape, where the model's code leaves a choice."""
    text = model.config.get_text_config(decoder=True)
    before = getattr(text, "_experts_implementation", None)
    if before in (None, "batched_mm"):
        with nullcontext():
            yield
        return

    def give_back() -> None:
        text._experts_implementation = before

    with loan(give_back):
        text._experts_implementation = "batched_mm"
        yield
