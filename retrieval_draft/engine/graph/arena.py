"""Keys and values of all layers in one tensor, at addresses that stay the same from request to request."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from retrieval_draft.engine.cache.kv_cache import SpeculativeCache, SpeculativeLayer

__all__ = ["PAGE", "Arena", "lies_on_one_device", "slot_bytes"]

PAGE = 256
"""Slots are a multiple of it."""

_Kind = tuple[int, int, int, torch.dtype]


def _kind(buffer: Tensor) -> _Kind:
    """Parts, heads, dimensions and dtype: layers that have these in common share a tensor."""
    return buffer.shape[0], buffer.shape[2], buffer.shape[4], buffer.dtype


def lies_on_one_device(cache: SpeculativeCache) -> bool:
    """True if a cache holds keys, all on one device."""
    return len({buffer.device for layer in cache.attention_layers for buffer in layer.buffers}) == 1


def slot_bytes(cache: SpeculativeCache) -> int:
    """Bytes that an arena for a cache takes for each position of a text."""
    return sum(
        parts * heads * dim * dtype.itemsize for shape in _shapes(cache) for parts, heads, dim, dtype in shape
    )


class Arena:
    """The memory of one cache at a time.

    A slot is a position of the text: windows keep what has left them. The cache works in it as in its own
    memory, except that an accepted path moves in all layers of a shape at once. Where the cache outgrows it,
    or another cache takes it, the former one continues in memory of its own.

    Args:
        cache: Has passed a text, which shows the layers' shapes. It does not move in yet.
        slots: Positions of a text, a multiple of `PAGE`.

    Attributes:
        slots: As given.
        tensors: One for each shape of a layer: (layers, parts, 1, heads, slots, dim), zero at first.

    Example:
        3 layers of 2 key heads of 8 dimensions, 256 slots: one tensor of (3, 2, 1, 2, 256, 8)
    """

    def __init__(self, cache: SpeculativeCache, slots: int) -> None:
        self.slots = slots
        self._shapes = _shapes(cache)
        counts: dict[_Kind, int] = {}
        for shape in self._shapes:
            for kind in shape:
                counts[kind] = counts.get(kind, 0) + 1
        device = next(buffer.device for layer in cache.attention_layers for buffer in layer.buffers)
        made = {
            kind: torch.zeros(
                (count, kind[0], 1, kind[1], slots, kind[2]), dtype=kind[3], device=device
            )
            for kind, count in counts.items()
        }  # fmt: skip
        self.tensors = tuple(made.values())
        layers = {kind: iter(tensor.unbind()) for kind, tensor in made.items()}
        self._views = [tuple(next(layers[kind]) for kind in shape) for shape in self._shapes]
        self._owner: weakref.ref[SpeculativeCache] | None = None
        self._bound: list[tuple[SpeculativeLayer, tuple[Tensor, ...], int, bool]] = []

    @property
    def owner(self) -> SpeculativeCache | None:
        """The cache that works in it, if it still lives."""
        return None if self._owner is None else self._owner()

    def fits(self, cache: SpeculativeCache) -> bool:
        """True if a cache has layers of the same shapes."""
        return _shapes(cache) == self._shapes

    def holds(self, cache: SpeculativeCache) -> bool:
        """True if a cache works in it, and none of its layers has moved away."""
        return self.owner is cache and all(
            layer.buffers is buffers and layer.start == start for layer, buffers, start, _ in self._bound
        )

    def take(self, cache: SpeculativeCache) -> None:
        """Moves a cache that fits in; the one before moves out."""
        owner = self.owner
        if owner is not None and owner is not cache:
            self.release(owner)
        if owner is not cache:
            for tensor in self.tensors:
                # Slots are read before they are written, under a mask: nothing of a failed pass may stay.
                tensor.zero_()
        here = {layer: keeps_all for layer, _, _, keeps_all in self._bound}
        bound = []
        for layer, views in zip(cache.attention_layers, self._views, strict=True):
            if views:
                keeps_all = here.get(layer, layer.keeps_all)
                buffers = tuple(view.narrow(-2, layer.start, self.slots - layer.start) for view in views)
                layer.move(buffers, True)
                bound.append((layer, layer.buffers, layer.start, keeps_all))
        self._bound, self._owner = bound, weakref.ref(cache)
        cache.mover = self._move

    def release(self, cache: SpeculativeCache) -> None:
        """Moves a cache out into memory of its own; nothing where it is not here."""
        if self.owner is not cache:
            return
        for layer, buffers, _, keeps_all in self._bound:
            if layer.buffers is buffers:
                layer.leave(keeps_all)
        cache.mover = None
        self._owner, self._bound = None, []

    def keys_and_values(self, keys: int) -> list[tuple[Tensor, Tensor] | None]:
        """Of each layer, (1, heads, keys, dim) each, the first `keys` slots; None for one without any."""
        return [
            (views[0][0].narrow(-2, 0, keys), views[-1][-1].narrow(-2, 0, keys)) if views else None
            for views in self._views
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def _move(self, moved: Tensor, kept: int) -> bool:
        owner = self.owner
        if owner is None or not self.holds(owner):
            return False
        layer = self._bound[0][0]
        for tensor in self.tensors:
            path = tensor.narrow(-2, layer.length, layer.staged).index_select(-2, moved)
            tensor.narrow(-2, layer.length + kept, len(moved)).copy_(path)
        return True


def _shapes(cache: SpeculativeCache) -> list[tuple[_Kind, ...]]:
    return [tuple(_kind(buffer) for buffer in layer.buffers) for layer in cache.attention_layers]
