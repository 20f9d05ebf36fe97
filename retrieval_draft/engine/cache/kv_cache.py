"""A key-value cache whose newest tokens can form a tree, of which one path is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from retrieval_draft._kernels.lazy import LazyKernels
from retrieval_draft.engine.compat import empty_layer, layer_kinds, query_length
from retrieval_draft.errors import UnsupportedModelError
from retrieval_draft.index.source import TokenArray

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["SpeculativeCache", "SpeculativeLayer", "layer_windows"]

_kernels = LazyKernels("retrieval_draft.engine._kernels.moves")

_GROWTH = 256
"""Buffers grow by at least so many tokens, and window layers shift at most once in so many."""


def layer_windows(config: PreTrainedConfig) -> list[tuple[str, int | None]]:
    """Layer type and sliding window of each layer, in order.

    Args:
        config: The model's configuration; of a multimodal one the text part is used.

    Returns:
        For each layer its type, "dummy" for one without keys of its own, and its window or None.

    Raises:
        UnsupportedModelError: A layer keeps state that a rejected draft token would spoil.
    """
    text = config.get_text_config(decoder=True)
    kinds = layer_kinds(text)
    for index, (kind, _) in enumerate(kinds):
        if kind not in ("full_attention", "sliding_attention", "dummy"):
            raise UnsupportedModelError(
                f"Layer {index} of {text.model_type!r} is of type {kind!r}, whose state "
                "cannot be rolled back after a rejected draft token.",
                "Only full and sliding-window attention are supported; use model.generate for this model.",
            )
    windows: dict[str, set[int | None]] = {}
    for kind, window in kinds:
        windows.setdefault(kind, set()).add(window)
    for kind, found in windows.items():
        if len(found) > 1:
            raise UnsupportedModelError(
                f"Layers of type {kind!r} have different windows: {sorted(map(str, found))}.",
                "One window for each layer type is supported; use model.generate for this model.",
            )
    return kinds


class SpeculativeLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Slot s of a buffer belongs to position `start + s`. Slots up to `length` are committed text;
    the `staged` slots after them are nodes of the tree being verified.

    Args:
        window: Tokens that a position sees, itself included, or None for all.
        capacity: Tokens to make room for at first.
        keeps_all: Whether keys that have left the window stay.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, window: int | None = None, capacity: int = 0, keeps_all: bool = False) -> None:
        self.is_initialized = False
        self.is_sliding = window is not None
        self.window = window
        self.length = 0
        self.start = 0
        self.staged = 0
        self._keeps = window is None or keeps_all
        self._hint = capacity
        self._buffers: tuple[Tensor, ...] = ()
        self._host_memory: list[tuple[int, int, int, int]] | None = None

    @property
    def capacity(self) -> int:
        """Slots allocated."""
        return self._buffers[0].shape[-2] if self._buffers else 0

    @property
    def expected(self) -> int:
        """Tokens that it was made to have room for."""
        return self._hint

    @property
    def host_memory(self) -> list[tuple[int, int, int, int, int]]:
        """Rows of `move_slots` for those buffers that a kernel can write."""
        if self._host_memory is None:
            self._host_memory = []
            for buffer in self._buffers:
                *blocks, capacity, dim = buffer.shape
                size = dim * buffer.element_size()
                if buffer.device.type == "cpu" and size % 4 == 0 and buffer.is_contiguous():
                    self._host_memory.append((buffer.data_ptr(), math.prod(blocks), capacity, size // 4))
        start = self.length - self.start
        return [(*memory, start) for memory in self._host_memory]

    @property
    def first_visible(self) -> int:
        """The first position that the next token sees."""
        return 0 if self.window is None else max(0, self.length - self.window + 1)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Committed keys that the next token sees: (batch, heads, tokens, dim)."""
        return self._view(self.first_visible, self.length)[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Committed values that the next token sees: (batch, heads, tokens, dim)."""
        return self._view(self.first_visible, self.length)[1] if self.is_initialized else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learns shapes, dtype and device from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        shapes = (key_states.shape, value_states.shape)
        together = shapes[0] == shapes[1] and key_states.dtype == value_states.dtype
        self._buffers = tuple(
            states.new_empty((parts, *states.shape[:2], 0, states.shape[-1]))
            for parts, states in (((2, key_states),) if together else ((1, key_states), (1, value_states)))
        )
        self._host_memory = None
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, staged: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes new keys and values after the committed ones.

        Args:
            key_states: (batch, heads, new, dim).
            value_states: (batch, heads, new, dim of values).
            *args: Ignored, as in every cache layer.
            staged: Whether they are tree nodes that wait for `commit`, not text.
            **kwargs: Ignored.

        Returns:
            Keys and values of everything the new tokens may see, themselves included; views that
            hold until the next update.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        seen = self.extend(new, staged=staged)
        if seen is None:
            return self._prefill(key_states, value_states)
        for view, states in zip(seen, (key_states, value_states), strict=True):
            view.narrow(-2, view.shape[-2] - new, new).copy_(states)
        return seen

    def extend(self, new: int, staged: bool = False) -> tuple[Tensor, Tensor] | None:
        """Makes room for new keys and values as `update` does, and leaves it to the caller to write them.

        Args:
            new: Number of new tokens.
            staged: As of `update`.

        Returns:
            Those of `update`, the last `new` rows unwritten; None, and nothing has changed, where that is
            not a part of the buffers.
        """
        if not self.is_initialized or (not self._keeps and not staged and new > self.slack(0)):
            return None
        first = self.first_visible
        self._reserve(new)
        seen = self._view(first, self.length + new)
        if staged:
            self.staged = new
        else:
            self.length += new
        return seen

    def commit(self, moved: Tensor | None, kept: int, count: int) -> None:
        """Keeps one path of the staged nodes as text and drops the others.

        Args:
            moved: int64, shape (count - kept,), on this layer's device. Nodes of the path from its
                `kept`-th on; None when there are none.
            kept: Leading nodes of the path that already lie in place: node i is the path's i-th.
            count: Nodes of the path.
        """
        if not self.is_initialized or not self.staged:
            return
        if moved is not None:
            base = self.length - self.start
            for buffer in self._buffers:
                path = buffer.narrow(-2, base, self.staged).index_select(-2, moved)
                buffer.narrow(-2, base + kept, count - kept).copy_(path)
        self.length += count
        self.staged = 0

    def get_seq_length(self) -> int:
        """Committed tokens."""
        return self.length

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        """Number of keys that `update` will return for so many new tokens, and the position of the first."""
        first = self.first_visible
        return self.length - first + query_length(query), first

    def get_max_length(self) -> int:
        """The window, or -1."""
        return -1 if self.window is None else self.window

    get_max_cache_shape = get_max_length
    """Name of `get_max_length` before transformers 5.17."""

    def clone(self, capacity: int = 0) -> SpeculativeLayer:
        """A copy of the committed text's keys and values, with room for `capacity` tokens in all."""
        copy = SpeculativeLayer(self.window, capacity, self._keeps)
        if self.is_initialized:
            copy.load(*self._view(self.start, self.length), self.start)
        return copy

    def load(self, key_states: Tensor, value_states: Tensor, start: int) -> None:
        """Takes over committed text.

        Args:
            key_states: (batch, heads, tokens, dim).
            value_states: (batch, heads, tokens, dim of values).
            start: Position of the first of them; earlier ones have left the window.
        """
        self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        self.length = self.start = start
        self._reserve(tokens)
        for part, states in zip(self._parts(), (key_states, value_states), strict=True):
            part.narrow(-2, 0, tokens).copy_(states)
        self.length += tokens

    def slots(self, first: int, end: int) -> list[Tensor]:
        """Views of the buffers at the positions from `first` to `end`: (parts, batch, heads, tokens, dim)."""
        return [buffer.narrow(-2, first - self.start, end - first) for buffer in self._buffers]

    def fill(self, runs: Sequence[Sequence[Tensor]], start: int) -> None:
        """Takes over committed text in runs, as `load` does at once.

        Args:
            runs: As `slots` returns them, one after the other.
            start: As of `load`.
        """
        self.dtype, self.device = runs[0][0].dtype, runs[0][0].device
        self._buffers = tuple(
            each.new_empty((*each.shape[:-2], 0, each.shape[-1]), device=each.device) for each in runs[0]
        )
        self._host_memory = None
        self.is_initialized = True
        self.length = self.start = start
        tokens = sum(run[0].shape[-2] for run in runs)
        self._reserve(tokens)
        for buffer, parts in zip(self._buffers, zip(*runs, strict=True), strict=True):
            torch.cat(parts, -2, out=buffer.narrow(-2, 0, tokens))
        self.length += tokens

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """(parts, batch, heads, slots, dim) each: keys and values together, or each alone."""
        return self._buffers

    @property
    def keeps_all(self) -> bool:
        """True if keys that have left the window stay, or none ever does."""
        return self._keeps

    def move(self, buffers: Sequence[Tensor], keeps_all: bool) -> None:
        """Moves text and staged nodes to other memory, in the same order.

        Args:
            buffers: As `buffers`, with as many slots or more. They may overlap the present ones.
            keeps_all: As of the layer, from now on.
        """
        used = self.length - self.start + self.staged
        for old, new in zip(self._buffers, buffers, strict=True):
            if old.data_ptr() != new.data_ptr():
                same = old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
                held = old.narrow(-2, 0, used)
                new.narrow(-2, 0, used).copy_(held.clone() if same else held)
        self._buffers, self._host_memory = tuple(buffers), None
        self._keeps = self.window is None or keeps_all

    def leave(self, keeps_all: bool) -> None:
        """Moves to memory of its own.

        Args:
            keeps_all: As of the layer, from now on. Without, keys that left the window long ago are
                forgotten.
        """
        self._keeps = self.window is None or keeps_all
        first = self.start
        if not self._keeps:
            first = max(first, self.first_visible - self.slack(0))
        used = self.length - first + self.staged
        self._buffers = tuple(
            buffer.narrow(-2, first - self.start, used).clone(memory_format=torch.contiguous_format)
            for buffer in self._buffers
        )
        self.start, self._host_memory = first, None

    def reset(self) -> None:
        """Forgets the text and keeps the buffers."""
        self.length = self.start = self.staged = 0

    def can_crop(self, length: int) -> bool:
        """True if the cache can be cropped to `length` tokens: the keys they see are still here."""
        first = 0 if self.window is None else max(0, length - self.window + 1)
        return length >= 0 and first >= self.start

    def held(self) -> tuple[Tensor, Tensor]:
        """Committed keys and values that are still here: (batch, heads, tokens, dim) each."""
        return self._view(self.start, self.length)

    def crop(self, tokens: int) -> None:
        """Removes tokens from the end, as layers of transformers do.

        Args:
            tokens: Their number, negated; a positive number is the length that is left, as before
                transformers 5.23.

        Raises:
            ValueError: A window has left keys that the last of the remaining tokens see.
        """
        length = self.length + tokens if tokens <= 0 else min(tokens, self.length)
        if not self.can_crop(length):
            raise ValueError(
                f"Cannot go back from {self.length} tokens to {length}: "
                f"positions before {self.start} have left the window."
            )
        self.length, self.staged = length, 0

    def _parts(self) -> tuple[Tensor, Tensor]:
        return self._buffers[0][0], self._buffers[-1][-1]

    def _view(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        keys, values = self._parts()
        begin, size = first - self.start, end - first
        return keys.narrow(-2, begin, size), values.narrow(-2, begin, size)

    def slack(self, new: int) -> int:
        """Slots of a window layer beyond its window; then a shift moves the window without overlap."""
        assert self.window is not None
        return max(self.window - 1, _GROWTH, new)

    def _reserve(self, new: int) -> None:
        """Makes room for `new` slots after the committed ones."""
        used = self.length - self.start
        if used + new <= self.capacity:
            return
        wanted = max(used + new, self._hint, self.capacity + max(_GROWTH, self.capacity // 2))
        first = self.start
        if not self._keeps:
            assert self.window is not None
            limit = self.window - 1 + self.slack(new)
            if used + new > limit:
                first = self.first_visible
            wanted = min(wanted, limit)
        kept = self.length - first
        moved = first - self.start
        if wanted <= self.capacity:
            for buffer in self._buffers:
                window = buffer.narrow(-2, moved, kept)
                buffer.narrow(-2, 0, kept).copy_(window if kept <= moved else window.clone())
        else:
            grown = []
            for buffer in self._buffers:
                larger = buffer.new_empty((*buffer.shape[:-2], wanted, buffer.shape[-1]))
                larger.narrow(-2, 0, kept).copy_(buffer.narrow(-2, moved, kept))
                grown.append(larger)
            self._buffers, self._host_memory = tuple(grown), None
        self.start = first

    def _prefill(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a long run of text into a window layer: all of it is seen, its end is kept."""
        assert self.window is not None
        new = key_states.shape[-2]
        full = (key_states, value_states)
        if self.length:
            old = self._view(self.first_visible, self.length)
            full = (torch.cat([old[0], full[0]], -2), torch.cat([old[1], full[1]], -2))
        kept = min(self.window, full[0].shape[-2])  # one more, so that one can be taken off
        self.length += new
        self.start, end = self.length - kept, self.length
        self.length = self.start
        self._reserve(kept)
        self.length = end
        for part, states in zip(self._parts(), full, strict=True):
            part[:, :, :kept].copy_(states[:, :, states.shape[-2] - kept :])
        return full


class SpeculativeCache(Cache):
    """A transformers cache in which a tree of draft tokens is written and one path of it kept.

    Forward passes inside ``stage(True)`` leave their tokens staged until `commit`; all others
    append text as any cache does, so that a returned cache can be used further.

    Args:
        config: The model's configuration.
        capacity: Tokens to make room for at first.
        keeps_all: Whether layers with a window keep keys that have left it.

    Attributes:
        text: int32. The first committed tokens, as far as they are known: all where a request has finished,
            none that other passes or a failed request have added.
        shift: The model's position of the next token, less its index in the text. Images may count as fewer
            positions than tokens, or as more.
        fixed: Leading tokens whose keys are not those of their ids alone, as of images: they cannot be made
            again from `text`.
        mover: Moves a path in all layers at once, where their memory allows it: takes path indices on the
            device and leading nodes in place, and returns whether it did.

    Raises:
        UnsupportedModelError: A layer keeps state that a rejected draft token would spoil.
    """

    takes_states_alone = True
    """`update` needs nothing but keys, values and the layer's number."""

    def __init__(self, config: PreTrainedConfig, capacity: int = 0, keeps_all: bool = False) -> None:
        super().__init__(
            layers=[
                empty_layer() if kind == "dummy" else SpeculativeLayer(window, capacity, keeps_all)
                for kind, window in layer_windows(config)
            ]
        )
        self._attention = [layer for layer in self.layers if isinstance(layer, SpeculativeLayer)]
        self.mover: Callable[[Tensor, int], bool] | None = None
        self._staging = False
        self._longest = 0
        self.shift = self.fixed = 0
        self.text: TokenArray = np.zeros(0, np.int32)

    def stage(self, staging: bool) -> None:
        """Sets whether the tokens of the next forward passes are tree nodes."""
        self._staging = staging

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes one layer's new keys and values, (batch, heads, new, dim); see `SpeculativeLayer.update`."""
        layer: Any = self.layers[layer_idx]
        seen: tuple[Tensor, Tensor] = layer.update(
            key_states, value_states, *args, staged=self._staging, **kwargs
        )
        return seen

    def extend(self, new: int, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """Makes room in one layer for new keys and values, which the caller writes; as of a layer."""
        layer: Any = self.layers[layer_idx]
        room: tuple[Tensor, Tensor] | None = layer.extend(new, staged=self._staging)
        return room

    def commit(self, moved: Tensor | None, kept: int, count: int) -> None:
        """Keeps one path of the staged nodes in every layer; for arguments see `SpeculativeLayer.commit`."""
        staged = [layer for layer in self._attention if layer.staged]
        if moved is not None and self.mover is not None and self.mover(moved, kept):
            moved = None
        if moved is not None and moved.device.type == "cpu":
            rows = [row for layer in staged for row in layer.host_memory]
            if len(rows) == sum(len(layer._buffers) for layer in staged):
                _kernels.move_slots(np.array(rows, np.int64).reshape(-1, 5), moved.numpy(), kept)
                moved = None
        here: dict[torch.device, Tensor] = {}
        for layer in staged:
            if moved is not None and layer.device not in here:
                here[layer.device] = moved.to(layer.device, non_blocking=True)
            layer.commit(here.get(layer.device), kept, count)

    @property
    def attention_layers(self) -> Sequence[SpeculativeLayer]:
        """Layers with keys of their own, in order."""
        return self._attention

    def carries(self, accepted: int) -> None:
        """Accepted tokens that the next pass repeats: none ever, since a path can be moved into place."""

    def clone(self, capacity: int = 0) -> SpeculativeCache:
        """A copy of the committed text, with room for `capacity` tokens in all; staged nodes are left out."""
        copy = object.__new__(SpeculativeCache)
        Cache.__init__(
            copy,
            layers=[
                layer.clone(capacity) if isinstance(layer, SpeculativeLayer) else type(layer)()
                for layer in self.layers
            ],
        )
        copy._attention = [layer for layer in copy.layers if isinstance(layer, SpeculativeLayer)]
        copy.mover = None
        copy._staging = False
        copy._longest = self._longest
        copy.shift, copy.fixed = self.shift, self.fixed
        copy.text = self.text
        return copy

    def keep(self, length: int) -> bool:
        """Removes everything after the first `length` tokens.

        Returns:
            False, with nothing changed, where a window has left keys that the last of them see.
        """
        if not all(layer.can_crop(length) for layer in self._attention if layer.is_initialized):
            return False
        self._longest = self.longest
        for layer in self._attention:
            if layer.is_initialized:
                layer.crop(length - layer.length)
        self.text = self.text[:length]
        return True

    def crop(self, tokens: int) -> None:
        """Removes tokens from the end of every layer; see `SpeculativeLayer.crop`."""
        self._longest = self.longest
        super().crop(tokens)
        self.text = self.text[: self.get_seq_length()]

    def reset(self) -> None:
        """Forgets the text and keeps the buffers."""
        for layer in self._attention:
            layer.reset()
        self._longest = self.shift = self.fixed = 0
        self.text = self.text[:0]

    def drop(self) -> None:
        """Drops all staged nodes."""
        for layer in self._attention:
            layer.staged = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest text since it was empty, cropped and expected ones included."""
        return max(self._longest, self.get_seq_length())

    def made_for(self, length: int) -> None:
        """Records that the keys were made for a text of `length` tokens."""
        self._longest = max(self._longest, length)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.numel() * b.element_size() for layer in self._attention for b in layer._buffers)
