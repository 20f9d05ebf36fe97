"""Keys and values of earlier texts, from which a request with the same beginning continues."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from retrieval_draft.engine.cache.kv_cache import SpeculativeCache, SpeculativeLayer
from retrieval_draft.engine.cache.prefix_states import PrefixStates, StatePrefix
from retrieval_draft.engine.cache.prefix_tree import Block, PrefixTree
from retrieval_draft.engine.model_version import ModelVersion
from retrieval_draft.engine.target import Target
from retrieval_draft.index.source import TokenArray

__all__ = ["Keeper", "Prefix", "PrefixCache", "Prefixes"]

_log = logging.getLogger("retrieval_draft")

_BLOCK_BYTES = 1 << 20
"""Most bytes of a block, so that it is copied in a fraction of a millisecond."""

_BLOCK_TOKENS = (8, 64)
"""Least and most tokens of a block."""

_BLOCK_OVERHEAD = 2048
"""Bytes that a block takes beside its keys and values, about."""

_LEAST = 8
"""Tokens of the shortest beginning that is taken: fewer are passed as fast."""

_WAITING = 64
"""Texts that may wait to be copied; beyond it the one that has waited longest is not kept, as where the
caches of those that wait take more than the limit of what is kept."""


class PrefixCache:
    """Blocks of keys and values, shared by all texts that begin with the same tokens.

    They are copied out of running and finished requests, a block at a time, and into the buffers of new
    ones. Layers with a sliding window keep the end of each pass over a prompt and of each text, where others
    can continue. Used by one thread at a time, but for the properties.

    Args:
        target: The model.
        max_bytes: Limit of all blocks; those used longest ago are removed.

    Attributes:
        max_bytes: As given.
        refusal: The reason why nothing is kept for this model, or empty.
        failures: Texts that were not kept, or not found, because of an error.
    """

    def __init__(self, target: Target, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.refusal = _refusal(target)
        self.failures = 0
        self._block_bytes = 0
        self._states = PrefixStates(max_bytes) if target.verification.way == "chain" else None
        self._target = target
        self._version = ModelVersion(target.model)
        self._weights = 0
        self._tree: PrefixTree | None = None
        self._layouts: _Layouts
        self._waiting: deque[Keeper] = deque()

    def prefixes(self, tenant: str, salt: str = "") -> Prefixes | None:
        """Earlier texts of a tenant with the present weights and adapters; None where nothing is kept.

        Texts with other weights are forgotten.

        Args:
            tenant: Name of the tenant.
            salt: Sets some of its texts apart from the others.
        """
        if self.refusal:
            return None
        try:
            weights, adapters = self._version.current()
        except Exception as error:  # of a parameter of a kind that is not known
            self.failed("found", error)
            return None
        if weights != self._weights:
            self.clear()
            self._weights = weights
        return Prefixes(self, (tenant, salt, adapters))

    def clear(self) -> None:
        """Forgets all texts."""
        if self._tree is not None:
            self._tree.clear()
            for layout in self._layouts:
                layout.spare.clear()
        for keeper in self._waiting:
            keeper.is_waiting = False
        self._tree = None
        self._waiting.clear()
        self._block_bytes = 0
        if self._states is not None:
            self._states.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return self._block_bytes + (0 if self._states is None else self._states.nbytes)

    def find(self, key: Hashable, text: TokenArray) -> Prefix | StatePrefix | None:
        """The longest beginning of a text, int32, shape (n,), that a request can continue."""
        rope = self._target.rope
        if rope is not None and len(text) >= rope.length:
            return None
        try:
            found = self._find(key, text) if self._states is None else self._states.find(key, text)
            return found if found is not None and found.length >= _LEAST else None
        except Exception as error:  # the request begins anew
            self.failed("found", error)
            return None

    def add(self, keeper: Keeper) -> None:
        """Notes that a text has grown; `work` copies what is new of it."""
        if self._states is not None:
            self._keep_states(self._states, keeper)
            return
        if keeper.is_waiting:
            return
        self._waiting.append(keeper)
        keeper.is_waiting, keeper.nbytes = True, keeper.cache.nbytes
        held = sum(each.nbytes for each in self._waiting)
        while len(self._waiting) > 1 and (len(self._waiting) > _WAITING or held > self.max_bytes):
            oldest = self._waiting.popleft()
            oldest.is_waiting = False
            held -= oldest.nbytes

    def work(self, seconds: float | None = None) -> None:
        """Copies texts that wait, a block at least, in about so many seconds; None copies all."""
        began = now = perf_counter()
        while self._waiting:
            before = now
            keeper = self._waiting[0]
            try:
                has_more = self._copy_block(keeper)
            except Exception as error:  # the request has its tokens all the same
                self.failed("kept", error)
                has_more = False
            if not has_more:
                keeper.is_waiting = False
                self._waiting.popleft()
            now = perf_counter()
            if seconds is not None and now - began + (now - before) >= seconds:  # the next takes as long
                return

    def _keep_states(self, states: PrefixStates, keeper: Keeper) -> None:
        """Copies the states of a text, of which the next pass would leave nothing."""
        cache = keeper.cache
        if cache.shift or cache.fixed:
            return
        try:
            keeper.at = states.keep(keeper.key, keeper.text, cache, keeper.at)
        except Exception as error:  # the request has its tokens all the same
            self.failed("kept", error)

    def failed(self, done: str, error: Exception) -> None:
        """Counts a text that could not be kept or found, and logs the first."""
        self.failures += 1
        if self.failures == 1:
            _log.warning("The beginning of a text could not be %s: %r", done, error, exc_info=error)

    def _find(self, key: Hashable, text: TokenArray) -> Prefix | None:
        """The longest beginning of a text that can be continued."""
        tree = self._tree
        if tree is None:
            return None
        windowed = self._layouts[1]
        blocks: list[Block] = []
        best = count = at = held_from = 0
        for block, common in tree.path(key, text):
            tree.touch(block)
            blocks.append(block)
            held: _Held = block.data
            end = common
            if windowed.layers:
                end = min(common, held.end)
                if held.begin:
                    held_from = at + held.begin
            if end and max(0, at + end - windowed.window + 1) >= held_from:
                best, count = at + end, len(blocks)
            if end < common:
                held_from = at + common
            at += common
        return Prefix(best, self._layouts, blocks[:count], tree.size) if best else None

    def _copy_block(self, keeper: Keeper) -> bool:
        """Copies the next block of a text, or walks over it where it is kept; False at the text's end."""
        cache = keeper.cache
        if keeper.at >= keeper.end or cache.get_seq_length() < keeper.end or not self._is_usual(cache):
            return False
        tree = self._tree
        if tree is None:
            self._layouts = full, windowed = _Layout(cache, False), _Layout(cache, True)
            size = _block_tokens(full.token_bytes + windowed.token_bytes)
            for layout in self._layouts:
                layout.divide(size)
            full.nbytes += _BLOCK_OVERHEAD
            tree = self._tree = PrefixTree(size)
        parent = keeper.block
        if parent is None or parent.is_out:
            parent, keeper.at = tree.root(keeper.key), 0
            keeper.block = parent
        tokens = keeper.text[keeper.at : min(keeper.at + tree.size, keeper.end)]
        parent.pins += 1
        try:
            block = self._block(tree, parent, tokens, keeper)
        finally:
            parent.pins -= 1
        if block is None or len(tokens) < tree.size:
            return False
        keeper.block, keeper.at = block, keeper.at + tree.size
        return keeper.at < keeper.end

    def _block(self, tree: PrefixTree, parent: Block, tokens: TokenArray, keeper: Keeper) -> Block | None:
        """The block of these tokens, filled as far as the request's cache can; None without memory."""
        full, size = self._layouts[0], len(tokens)
        block, common = tree.child(parent, tokens)
        if block is None or common < min(size, len(block.tokens)):
            states = self._allocate(tree, 0)
            if states is None:
                return None
            try:
                full.copy(keeper.cache, keeper.at, 0, size, states)
            except BaseException:
                full.spare.append(states)
                raise
            block = tree.add(parent, tokens.copy(), _Held(states))
        elif common < size:
            full.copy(keeper.cache, keeper.at, common, size, block.data.states)
            tree.extend(block, tokens.copy())
        tree.touch(block)
        block.pins += 1
        try:
            self._keep_window(tree, block.data, size, keeper)
        finally:
            block.pins -= 1
        return block

    def _keep_window(self, tree: PrefixTree, held: _Held, size: int, keeper: Keeper) -> None:
        """Copies those keys of a block that the next tokens see in layers with a window."""
        windowed = self._layouts[1]
        if not windowed.layers:
            return
        first = max(windowed.start(keeper.cache), keeper.end - windowed.window - tree.size)
        begin = max(first - keeper.at, 0)
        if begin >= size or (held.begin <= begin and size <= held.end):
            return
        if held.window is None:
            held.window = self._allocate(tree, 1)
            if held.window is None:
                return
        joins = begin <= held.end and held.begin <= size
        copied = held.end if joins and held.begin <= begin else begin
        windowed.copy(keeper.cache, keeper.at, copied, size, held.window)
        if joins:
            held.begin, held.end = min(held.begin, begin), max(held.end, size)
        else:
            held.begin, held.end = begin, size

    def _allocate(self, tree: PrefixTree, kind: int) -> list[Tensor] | None:
        """Memory for a block's keys and values, of full layers (0) or of those with a window (1)."""
        layout, other = self._layouts[kind], self._layouts[1 - kind]
        while True:
            if layout.spare:
                return layout.spare.pop()
            if self._block_bytes + layout.nbytes <= self.max_bytes:
                states = layout.allocate()
                self._block_bytes += layout.nbytes
                return states
            if other.spare:
                other.spare.pop()
                self._block_bytes -= other.nbytes
                continue
            removed = tree.remove_oldest()
            if removed is None:
                return None
            self._layouts[0].spare.append(removed.data.states)
            if removed.data.window is not None:
                self._layouts[1].spare.append(removed.data.window)

    def _is_usual(self, cache: SpeculativeCache) -> bool:
        """True if the keys are those that any text with this beginning has."""
        rope = self._target.rope
        return not cache.shift and not cache.fixed and (rope is None or cache.longest <= rope.length)


@dataclass(slots=True)
class _Held:
    """Keys and values of a block.

    Attributes:
        states: Of layers that see all tokens.
        window: Of layers with a window; None where none are held.
        begin: The first token in the block whose keys `window` holds.
        end: The first one after it whose keys it does not hold.
    """

    states: list[Tensor]
    window: list[Tensor] | None = None
    begin: int = 0
    end: int = 0


class _Layout:
    """Shapes of a block's keys and values in the layers of one kind.

    Args:
        cache: One with text.
        windowed: Whether the layers with a window are meant, or the others.

    Attributes:
        layers: Their indices in the cache, each with the number of its buffers.
        window: Their window; 0 without one.
        token_bytes: Bytes of a token.
        nbytes: Bytes of a block, once `divide` has run.
        spare: Memory of removed blocks.
    """

    def __init__(self, cache: SpeculativeCache, windowed: bool) -> None:
        mine = [
            (index, layer)
            for index, layer in enumerate(cache.layers)
            if isinstance(layer, SpeculativeLayer) and layer.is_initialized and layer.is_sliding == windowed
        ]
        self.window = max((layer.window or 0 for _, layer in mine), default=0)
        like = [layer.slots(layer.start, layer.start + 1) for _, layer in mine]
        self.layers = [(index, len(buffers)) for (index, _), buffers in zip(mine, like, strict=True)]
        self._like = [buffer for buffers in like for buffer in buffers]
        self.token_bytes = sum(buffer.numel() * buffer.element_size() for buffer in self._like)
        self.nbytes = 0
        self.spare: list[list[Tensor]] = []

    def divide(self, tokens: int) -> None:
        """Sets the tokens of a block."""
        self._shapes = [(*each.shape[:-2], tokens, each.shape[-1]) for each in self._like]
        self._like = [each.new_empty(0, device=each.device) for each in self._like]
        self.nbytes = tokens * self.token_bytes

    def allocate(self) -> list[Tensor]:
        """Memory for a block: a tensor for each buffer, those of one kind side by side."""
        out: list[Any] = [None] * len(self._shapes)
        kinds: dict[Any, list[int]] = {}
        for index, like in enumerate(self._like):
            kinds.setdefault((like.dtype, like.device), []).append(index)
        for (dtype, device), indices in kinds.items():
            sizes = [math.prod(self._shapes[index]) for index in indices]
            parts = torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)
            for index, part in zip(indices, parts, strict=True):
                out[index] = part.view(self._shapes[index])
        return out

    def start(self, cache: SpeculativeCache) -> int:
        """The first position whose keys all these layers of a cache still hold."""
        layers: Any = cache.layers
        return max(int(layers[index].start) for index, _ in self.layers)

    def copy(self, cache: SpeculativeCache, at: int, begin: int, end: int, states: list[Tensor]) -> None:
        """Copies the tokens from `begin` to `end` of a block that begins at position `at` of a cache."""
        if states:
            layers: Any = cache.layers
            slots = [slot for index, _ in self.layers for slot in layers[index].slots(at + begin, at + end)]
            torch._foreach_copy_([each.narrow(-2, begin, end - begin) for each in states], slots)

    def fill(self, cache: SpeculativeCache, runs: Sequence[_Run], start: int) -> Iterator[None]:
        """Gives these layers of an empty cache their text. Yields after each."""
        layers: Any = cache.layers
        first = 0
        for index, buffers in self.layers:
            parts = range(first, first + buffers)
            layers[index].fill(
                [
                    [run.states[part].narrow(-2, run.begin, run.end - run.begin) for part in parts]
                    for run in runs
                ],
                start,
            )
            first += buffers
            yield


class _Run(NamedTuple):
    """A part of a block."""

    states: list[Tensor]
    begin: int
    end: int


_Layouts: TypeAlias = tuple[_Layout, _Layout]
"""Of layers that see all tokens, and of layers with a window."""


class Prefix:
    """The beginning of a text, with its keys and values.

    Args:
        length: Its tokens.
        layouts: Of layers without and with a window.
        blocks: They hold it.
        size: Tokens of each but the last.
    """

    def __init__(self, length: int, layouts: _Layouts, blocks: Sequence[Block], size: int) -> None:
        self.length = length
        self._layouts, self._blocks, self._size = layouts, blocks, size

    def fill(self, cache: Any) -> Iterator[None]:
        """Copies it into an empty cache, layer by layer. Yields in between, when other rows may step."""
        for block in self._blocks:
            block.pins += 1
        try:
            full, windowed = self._layouts
            yield from full.fill(cache, [_Run(held.states, *part) for held, *part in self._parts(0)], 0)
            start = max(0, self.length - windowed.window + 1)
            runs = [_Run(held.window or [], *part) for held, *part in self._parts(start)]
            yield from windowed.fill(cache, runs, start)
        finally:
            for block in self._blocks:
                block.pins -= 1

    def _parts(self, start: int) -> Iterator[tuple[_Held, int, int]]:
        """The data of each block, with begin and end of its part of the text after `start`."""
        for index, block in enumerate(self._blocks):
            at = index * self._size
            begin, end = max(start - at, 0), min(self.length - at, self._size)
            if begin < end:
                yield block.data, begin, end


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The texts that a request may continue: those of its tenant, by the model as it is.

    Attributes:
        cache: Holds them.
        key: Sets them apart from others.
    """

    cache: PrefixCache
    key: Hashable

    def find(self, prompt: TokenArray) -> Prefix | StatePrefix | None:
        """The longest beginning of a prompt, int32, shape (length,), that leaves a token to be passed."""
        return self.cache.find(self.key, prompt[:-1])

    def keeper(self, cache: Any) -> Keeper:
        """Keeps the text of a request with this cache."""
        return Keeper(self, cache)


class Keeper:
    """The text of a request that is being kept.

    Args:
        prefixes: The texts that it joins.
        cache: Of the request.

    Attributes:
        key: Of the prefixes.
        cache: As given.
        text: int32. So far.
        end: Its tokens that the cache holds.
        at: Tokens that are kept.
        block: The block of the last of them; None before the first.
        is_waiting: Whether there is more to copy.
        nbytes: Bytes of the cache when it began to wait.
    """

    __slots__ = ("_prefixes", "at", "block", "cache", "end", "is_waiting", "nbytes", "text")

    def __init__(self, prefixes: Prefixes, cache: Any) -> None:
        self._prefixes, self.cache = prefixes, cache
        self.text: TokenArray = np.zeros(0, np.int32)
        self.end = self.at = self.nbytes = 0
        self.block: Block | None = None
        self.is_waiting = False

    @property
    def key(self) -> Hashable:
        """Key of the texts that it joins."""
        return self._prefixes.key

    def beside(self, cache: Any) -> Keeper:
        """Keeps the text of another request with the same prompt."""
        return Keeper(self._prefixes, cache)

    def extend(self, text: TokenArray, end: int) -> None:
        """Has the first `end` tokens of a text kept, soon: int32, shape (length,). Does not wait."""
        self.text, self.end = text, end
        self._prefixes.cache.add(self)


def _block_tokens(token_bytes: int) -> int:
    """Tokens of a block: a power of two."""
    least, most = _BLOCK_TOKENS
    tokens = most
    while tokens > least and tokens * token_bytes > _BLOCK_BYTES:
        tokens //= 2
    return tokens


def _refusal(target: Target) -> str:
    """The reason why texts of a model cannot be continued from a block, or empty."""
    if target.verification.way == "plain":
        return "Nothing is drafted for it: its own generate makes a cache for each text."
    if target.passes_whole or not target.passes_parts:
        return "It reads a prompt at once: in parts its tokens may have other keys or states."
    return ""
