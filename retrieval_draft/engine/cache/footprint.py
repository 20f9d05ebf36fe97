"""Memory that the cache of a request will take, before it is made."""

from __future__ import annotations

from typing import Any

import torch

from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.graph.arena import PAGE
from retrieval_draft.engine.target import Target

__all__ = ["CacheFootprint"]

_TRIED = (8, 72)
"""Lengths of the texts that are passed to find it out."""


class CacheFootprint:
    """Bytes of a request's cache by the length of its text, found out with passes over a few tokens.

    Args:
        target: The model.
    """

    def __init__(self, target: Target) -> None:
        short, long = (_passed(target, length) for length in _TRIED)
        self._layers: list[tuple[float, int | None]] = []
        self._fixed, self._least = 0.0, 0
        self._unit = 1 if target.width is None else PAGE  # passes of one shape take memory by pages
        if isinstance(long, SpeculativeCache):
            layers: Any = long.layers
            for layer in layers:
                size = sum(each.numel() * each.element_size() for each in getattr(layer, "_buffers", ()))
                if size:
                    self._least = max(self._least, layer.capacity)  # that of a text of a few tokens
                    window = layer.window
                    # Passes of one shape keep all keys.
                    is_whole = window is None or target.width is not None
                    most = None if is_whole else window - 1 + layer.slack(0)
                    self._layers.append((size / layer.capacity, most))
        else:  # what does not grow with the text is a state
            each = (long.nbytes - short.nbytes) / (_TRIED[1] - _TRIED[0])
            self._layers.append((each, None))
            self._fixed = max(short.nbytes - each * _TRIED[0], 0.0)

    def bytes(self, tokens: int) -> int:
        """Bytes of the cache of a text, prompt and reply."""
        tokens = -(-max(tokens, self._least) // self._unit) * self._unit
        slots = sum(each * (tokens if most is None else min(tokens, most)) for each, most in self._layers)
        return int(self._fixed + slots)


def _passed(target: Target, length: int) -> Any:
    cache = target.cache(length)
    ids = torch.zeros(length, dtype=torch.int64, device=target.device)
    for _ in target.prefill(cache, ids, 1):
        pass
    target.release(cache)  # memory of passes has room for longer texts
    return cache
