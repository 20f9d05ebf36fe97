"""Committed states of cache layers that cannot take tokens back: recurrences, convolutions, full windows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from retrieval_draft.engine.compat import croppable_layers

__all__ = ["SavedStates", "can_crop", "crop_layers", "snapshot", "tensors_of"]

_ATTENTION = ("keys", "values")


class SavedStates:
    """One copy of what a pass changes in a cache, but for keys and values that can be cut off again.

    The copy's memory is kept from one pass to the next.
    """

    def __init__(self) -> None:
        self._copies: dict[int, dict[str, Any]] = {}
        self._keys: dict[int, dict[str, Any]] = {}

    def take(self, cache: Cache) -> None:
        """Copies the present states of `cache`."""
        for index, part in _parts(cache):
            grows = _is_concatenated(part)
            # Such keys are never written to, only replaced by longer ones.
            self._keys[index] = {name: vars(part).get(name) for name in _ATTENTION} if grows else {}
            known = self._copies.get(index, {})
            self._copies[index] = {
                name: _copied(value, known.get(name))
                for name, value in vars(part).items()
                if name != "layers" and not (grows and name in _ATTENTION)
            }

    def give_back(self, cache: Cache) -> None:
        """Puts the copied states into `cache`, and keeps the copy."""
        for index, part in _parts(cache):
            for name, value in self._copies[index].items():
                setattr(part, name, _copied(value, getattr(part, name, None)))
            for name, value in self._keys[index].items():
                setattr(part, name, value)

    def tensors(self) -> Iterator[Tensor]:
        """All copies."""
        yield from tensors_of(self._copies)


def snapshot(cache: Any) -> Any:
    """A copy of a cache, which shares those keys and values that are never written to."""
    shared = [
        getattr(layer, name)
        for layer in getattr(cache, "layers", ())
        if _is_concatenated(layer)
        for name in _ATTENTION
    ]
    return copy.deepcopy(cache, {id(each): each for each in shared})


def can_crop(cache: Cache, length: int) -> bool:
    """True if each layer of a cache of `length` tokens can be cropped to fewer."""
    return _is_plain(cache) and all(_is_croppable(layer, length) for layer in cache.layers)


def crop_layers(cache: Cache, length: int) -> None:
    """Removes what follows the first `length` tokens from the layers that can be cropped."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, DynamicLayer) and layer.is_initialized and _has_crop(layer):
            excess = layer.get_seq_length() - length
            if excess > 0:
                layer.crop(-excess)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in dictionaries and lists, in attributes of cache layers too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_of(each)


def _parts(cache: Cache) -> Iterator[tuple[int, Any]]:
    """The layers whose states must be copied; the cache itself, as -1, where it has states of its own."""
    if not _is_plain(cache):
        yield -1, cache
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) not in croppable_layers():
            yield index, layer


def _is_plain(cache: Any) -> bool:
    """True if all that a cache holds lies in its layers."""
    others = {name: value for name, value in vars(cache).items() if name != "layers"}
    return hasattr(cache, "layers") and next(tensors_of(others), None) is None


def _is_croppable(layer: Any, length: int) -> bool:
    if type(layer) is DynamicSlidingWindowLayer:
        return length < layer.sliding_window
    return type(layer) in croppable_layers()


def _has_crop(layer: Any) -> bool:
    return type(layer) is DynamicSlidingWindowLayer or type(layer) in croppable_layers()


def _is_concatenated(layer: Any) -> bool:
    """True if a layer's keys and values are replaced by longer tensors, never written to."""
    update = getattr(type(layer), "update", None)
    return update in (DynamicLayer.update, DynamicSlidingWindowLayer.update)


def _copied(value: Any, into: Any) -> Any:
    """A copy, in the memory of an earlier one where shapes allow it."""
    if isinstance(value, Tensor):
        if isinstance(into, Tensor) and (into.shape, into.dtype, into.device) == (
            value.shape,
            value.dtype,
            value.device,
        ):
            return into if into is value else into.copy_(value)
        return value.clone()
    if isinstance(value, dict):
        known = into if isinstance(into, dict) else {}
        return {key: _copied(each, known.get(key)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        old = into if isinstance(into, (list, tuple)) and len(into) == len(value) else [None] * len(value)
        return type(value)(_copied(each, before) for each, before in zip(value, old, strict=True))
    return value
