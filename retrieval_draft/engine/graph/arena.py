"""Keys and values of all layers in one tensor, at addresses that stay the same from request to request."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from retrieval_draft.engine.cache.kv_cache import SpeculativeCache, SpeculativeLayer

__all__ = ["PAGE", "Arena", "PassMemory", "layer_shapes", "lies_on_one_device", "slot_bytes"]

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
        parts * heads * dim * dtype.itemsize
        for shape in layer_shapes(cache)
        for parts, heads, dim, dtype in shape
    )


class PassMemory(Protocol):
    """The arenas of a model's passes, which hold caches for as long as these decode."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arenas."""
        ...

    def holds(self, cache: Any) -> bool:
        """True for a cache that has no other memory."""
        ...

    def limit(self, nbytes: int | None) -> None:
        """Limits `nbytes`, as far as passes can do with less; None for no limit."""
        ...


@dataclass(slots=True)
class _Lane:
    """The cache in a lane: its layers, the buffers and first positions given to them, and what they kept.

    It is whole once all layers have moved in.
    """

    owner: weakref.ref[SpeculativeCache]
    is_whole: bool = False
    bound: list[tuple[SpeculativeLayer, tuple[Tensor, ...], int, bool]] = field(default_factory=list)


class Arena:
    """The memory of caches that are read in one pass: a lane for each.

    A slot is a position of the text: windows keep what has left them. A cache works in its lane as in its own
    memory, except that an accepted path moves in all layers of a shape at once. Where the cache outgrows it,
    or another cache takes the lane, the former one continues in memory of its own.

    Args:
        cache: Has passed a text, which shows the layers' shapes. It does not move in yet.
        slots: Positions of a text, a multiple of `PAGE`.
        rows: Lanes.

    Attributes:
        slots: As given.
        rows: As given.
        tensors: One for each shape of a layer: (layers, parts, rows, heads, slots, dim), zero at first.
        lanes: int64, shape (rows, 1). 0, 1, 2, ...

    Example:
        3 layers of 2 key heads of 8 dimensions, 256 slots, 4 rows: one tensor of (3, 2, 4, 2, 256, 8)
    """

    def __init__(self, cache: SpeculativeCache, slots: int, rows: int = 1) -> None:
        self.slots, self.rows = slots, rows
        self._shapes = layer_shapes(cache)
        counts: dict[_Kind, int] = {}
        for shape in self._shapes:
            for kind in shape:
                counts[kind] = counts.get(kind, 0) + 1
        device = next(buffer.device for layer in cache.attention_layers for buffer in layer.buffers)
        made = {
            kind: torch.zeros(
                (count, kind[0], rows, kind[1], slots, kind[2]), dtype=kind[3], device=device
            )
            for kind, count in counts.items()
        }  # fmt: skip
        self.tensors = tuple(made.values())
        layers = {kind: iter(tensor.unbind()) for kind, tensor in made.items()}
        self._views = [tuple(next(layers[kind]) for kind in shape) for shape in self._shapes]
        self._lanes: list[_Lane | None] = [None] * rows
        self.lanes = torch.arange(rows, device=device)[:, None]

    def owner(self, lane: int = 0) -> SpeculativeCache | None:
        """The cache that works in a lane, if it still lives."""
        held = self._lanes[lane]
        return None if held is None else held.owner()

    def fits(self, cache: SpeculativeCache) -> bool:
        """True if a cache has layers of the same shapes."""
        return layer_shapes(cache) == self._shapes

    def holds(self, cache: SpeculativeCache, lane: int = 0) -> bool:
        """True if a cache works in a lane, and none of its layers has moved away."""
        held = self._lanes[lane]
        return (
            held is not None
            and held.is_whole
            and held.owner() is cache
            and all(
                layer.buffers is buffers and layer.start == start for layer, buffers, start, _ in held.bound
            )
        )

    def assign(self, caches: Sequence[SpeculativeCache], rows: int) -> list[int]:
        """Moves caches that fit into the first `rows` lanes, and all others out of these.

        Args:
            caches: As many as rows, or fewer.
            rows: Number of lanes.

        Returns:
            The lane of each.

        Example:
            caches a, b, c in lanes 0, 3, 5, two rows for b and c: a moves out, they move to lanes 0 and 1
        """
        found = [next((lane for lane in range(rows) if self.holds(cache, lane)), None) for cache in caches]
        free = iter([lane for lane in range(rows) if lane not in found])
        lanes = [next(free) if lane is None else lane for lane in found]
        for cache, before, lane in zip(caches, found, lanes, strict=True):
            if before is None:
                self.take(cache, lane)
        self.vacate([lane for lane in range(rows) if lane not in lanes])
        return lanes

    def vacate(self, lanes: Iterable[int]) -> None:
        """Moves the caches in these lanes out, before others are written there."""
        for lane in lanes:
            owner = self.owner(lane)
            if owner is not None:
                self.release(owner)

    def take(self, cache: SpeculativeCache, lane: int = 0) -> None:
        """Moves a cache that fits into a lane; the one before moves out."""
        owner = self.owner(lane)
        if owner is not None and owner is not cache:
            self.release(owner)
        former = {
            layer: keeps_all
            for held in self._lanes
            if held is not None and held.owner() is cache
            for layer, _, _, keeps_all in held.bound
        }
        if owner is not cache:
            for tensor in self.tensors:
                # Slots are read before they are written, under a mask: nothing of a failed pass may stay.
                tensor[:, :, lane].zero_()
        # The lane is the cache's before its first layer is there: where a later one fails to move, no
        # other is let in.
        held = self._lanes[lane] = _Lane(weakref.ref(cache))
        for layer, views in zip(cache.attention_layers, self._views, strict=True):
            if views:
                keeps_all = former.get(layer, layer.keeps_all)
                size = self.slots - layer.start
                buffers = tuple(view[:, lane : lane + 1].narrow(-2, layer.start, size) for view in views)
                layer.move(buffers, True)
                held.bound.append((layer, layer.buffers, layer.start, keeps_all))
        for at, other in enumerate(self._lanes):
            if at != lane and other is not None and other.owner() is cache:
                self._lanes[at] = None
        held.is_whole = True
        cache.mover = partial(self._move, lane)

    def release(self, cache: SpeculativeCache) -> None:
        """Moves a cache out into memory of its own; nothing where it is not here."""
        for lane, held in enumerate(self._lanes):
            if held is None or held.owner() is not cache:
                continue
            for layer, buffers, _, keeps_all in held.bound:
                if layer.buffers is buffers:
                    layer.leave(keeps_all)
            cache.mover = None
            self._lanes[lane] = None

    def vacate_all_but(self, caches: Iterable[SpeculativeCache]) -> None:
        """Moves all caches out but these."""
        kept = list(caches)
        for lane in range(self.rows):
            owner = self.owner(lane)
            if owner is not None and not any(owner is cache for cache in kept):
                self.release(owner)

    def clear(self) -> None:
        """Moves all caches out."""
        self.vacate(range(self.rows))

    def keys_and_values(self, keys: int, rows: int = 1) -> list[tuple[Tensor, Tensor] | None]:
        """Of each layer, (rows, heads, keys, dim) each, the first `keys` slots; None for one without any."""
        return [
            (
                views[0][0].narrow(0, 0, rows).narrow(-2, 0, keys),
                views[-1][-1].narrow(0, 0, rows).narrow(-2, 0, keys),
            )
            if views
            else None
            for views in self._views
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def move_rows(self, moves: Tensor) -> None:
        """Moves keys and values in all layers of the first lanes, two calls for each shape of a layer.

        Args:
            moves: int64, shape (2, rows, m). Slots, and those that they move to.
        """
        lanes = self.lanes[: moves.shape[1]]
        # All are read before the first is written: where memory is short, nothing has moved.
        paths = [tensor[:, :, lanes, :, moves[0]] for tensor in self.tensors]
        for tensor, path in zip(self.tensors, paths, strict=True):
            tensor[:, :, lanes, :, moves[1]] = path

    def _move(self, lane: int, moved: Tensor, kept: int) -> bool:
        owner, held = self.owner(lane), self._lanes[lane]
        if owner is None or held is None or not held.bound or not self.holds(owner, lane):
            return False
        layer = held.bound[0][0]
        for tensor in self.tensors:
            own = tensor[:, :, lane]
            path = own.narrow(-2, layer.length, layer.staged).index_select(-2, moved)
            own.narrow(-2, layer.length + kept, len(moved)).copy_(path)
        return True


def layer_shapes(cache: SpeculativeCache) -> list[tuple[_Kind, ...]]:
    """Of each layer's buffers what they have in common with those that may share a tensor with them."""
    return [tuple(_kind(buffer) for buffer in layer.buffers) for layer in cache.attention_layers]
