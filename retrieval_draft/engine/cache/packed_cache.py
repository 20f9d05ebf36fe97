"""Several requests' caches in one forward pass, their new tokens side by side in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from retrieval_draft.engine.attention.tree_mask import Mask, TreeInputs
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache

__all__ = ["PackedCache", "PackedLayer"]


class PackedLayer:
    """Inputs of attention for one layer in one pass.

    Attributes:
        views: For each request its keys and values, (1, heads, its tokens, dim) each.
        masks: For each request its own mask, as `TreeInputs` has them.
    """

    __slots__ = ("masks", "new_keys", "views")

    def __init__(
        self, new_keys: Tensor, views: list[tuple[Tensor, Tensor]], masks: list[Tensor | None]
    ) -> None:
        self.new_keys = new_keys  # kept, so that nothing else gets its identity during the pass
        self.views = views
        self.masks = masks


class PackedCache(Cache):
    """Gives each request its part of a pass over the trees of several, all staged.

    Linear layers then work on real tokens only, for any lengths and trees of the requests; each
    request's attention reads its own keys and no others.

    Args:
        caches: One for each request.
        inputs: Their trees, prepared.
        kinds: The layer type of each layer, as keys of the masks.
        joined: False for attention request by request, which finds its inputs by `layer_of`. True for
            any attention there is: it gets all keys in one row, and must be given `joined_mask`.

    Example:
        requests of 100 and 40 tokens with trees of 3 and 2 nodes: 5 tokens pass through the linear layers;
        nodes 0-2 see keys of the first request, nodes 3-4 of the second
    """

    takes_states_alone = True
    """As of `SpeculativeCache`."""

    def __init__(
        self,
        caches: Sequence[SpeculativeCache],
        inputs: Sequence[TreeInputs],
        kinds: Sequence[str],
        joined: bool = False,
    ) -> None:
        super().__init__(layers=caches[0].layers)
        self._caches = caches
        self._kinds = kinds
        self._joined = joined
        self._masks: list[Mask] = [given.attention_mask for given in inputs]
        self.sizes = [given.input_ids.shape[1] for given in inputs]
        self._layers: dict[int, PackedLayer] = {}
        self._unread: set[int] = set()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stages one layer's new keys and values with the requests they belong to.

        Args:
            key_states: (1, heads, new tokens of all requests, dim).
            value_states: (1, heads, new tokens of all requests, dim of values).
            layer_idx: Index of the layer.
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            All keys and values of all requests where the pass is joined; else the new ones, by which
            attention finds the rest.
        """
        views = []
        begin = 0
        for cache, size in zip(self._caches, self.sizes, strict=True):
            layer: Any = cache.layers[layer_idx]
            keys = key_states.narrow(-2, begin, size)
            values = value_states.narrow(-2, begin, size)
            views.append(layer.update(keys, values, *args, staged=True, **kwargs))
            begin += size
        if self._joined:
            return torch.cat([view[0] for view in views], -2), torch.cat([view[1] for view in views], -2)
        kind = self._kinds[layer_idx]
        masks = [mask.get(kind) if isinstance(mask, dict) else mask for mask in self._masks]
        self._layers[id(key_states)] = PackedLayer(key_states, views, masks)
        self._unread.add(id(key_states))
        return key_states, value_states

    def layer_of(self, keys: Tensor) -> PackedLayer | None:
        """The layer with these new keys, (1, heads, new, dim), as `update` returned them; else None."""
        self._unread.discard(id(keys))
        return self._layers.get(id(keys))

    @property
    def is_read(self) -> bool:
        """True if attention asked for every layer that was updated."""
        return not self._unread

    def joined_mask(self) -> Mask:
        """One mask for all requests, in which no request sees a token of another.

        Returns:
            Additive, shape (1, 1, nodes of all, keys of all), or one such mask for each layer type.
        """
        kinds = {kind: self._kinds.index(kind) for kind in dict.fromkeys(self._kinds) if kind != "dummy"}
        made: dict[str, Tensor | None] = {
            kind: self._block_mask(kind, [self._visible(cache, index) for cache in self._caches])
            for kind, index in kinds.items()
        }
        return made if len(made) > 1 else next(iter(made.values()))

    def _visible(self, cache: SpeculativeCache, index: int) -> int:
        layer: Any = cache.layers[index]
        return int(layer.length - layer.first_visible)

    def _block_mask(self, kind: str, committed: list[int]) -> Tensor:
        columns = [seen + size for seen, size in zip(committed, self.sizes, strict=True)]
        some: Any = self._caches[0].layers[self._kinds.index(kind)]
        lowest = torch.finfo(some.dtype).min
        out = torch.full(
            (1, 1, sum(self.sizes), sum(columns)), lowest, dtype=some.dtype, device=self.first_device
        )
        row = column = 0
        for mask, size, width in zip(self._masks, self.sizes, columns, strict=True):
            own = mask.get(kind) if isinstance(mask, dict) else mask
            block = out[:, :, row : row + size, column : column + width]
            if own is None:
                block.zero_()
            else:
                block.copy_(own)
            row, column = row + size, column + width
        return out

    @property
    def first_device(self) -> torch.device:
        """Device of the first mask or layer."""
        for mask in self._masks:
            for tensor in mask.values() if isinstance(mask, dict) else (mask,):
                if tensor is not None:
                    return tensor.device
        layer: Any = self._caches[0].layers[0]
        device: torch.device = layer.device
        return device

    def drop(self) -> None:
        """Drops the staged nodes of every request."""
        for cache in self._caches:
            cache.drop()
