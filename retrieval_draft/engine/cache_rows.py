"""Caches handed in and back: a conversation's keys and values from one call to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from retrieval_draft.engine.kv_cache import SpeculativeCache, SpeculativeLayer
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError
from retrieval_draft.index.source import TokenArray

__all__ = ["CacheRows", "adopt", "write_back"]


class CacheRows(Cache):
    """The caches of a batch, one for each row, to be handed back to the drafter.

    Args:
        rows: In the order of the sequences they belong to.
    """

    def __init__(self, rows: Sequence[SpeculativeCache]) -> None:
        super().__init__(layers=rows[0].layers)
        self.rows = tuple(rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row."""
        return max(row.get_seq_length(layer_idx) for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(row.nbytes for row in self.rows)


def adopt(
    given: Any, prompts: Sequence[TokenArray], padding: Sequence[int], target: Target
) -> list[SpeculativeCache]:
    """Caches that begin each row, from what a caller passed as ``past_key_values``.

    Of a cache that this package made the text is known: what the prompt does not share with it is taken off,
    so that an edited conversation is right too. One of transformers is taken at its word, and copied.

    Args:
        given: A `SpeculativeCache`, a `CacheRows` or a ``DynamicCache`` of transformers.
        prompts: Whole texts, what is cached included, padding stripped.
        padding: Tokens that were stripped from each.
        target: The model.

    Returns:
        One cache for each prompt, each at least a token shorter than its prompt.

    Raises:
        InvalidInputError: It holds other rows or more text than the prompts.
        UnsupportedGenerationError: It is of another type.
    """
    if isinstance(given, (SpeculativeCache, CacheRows)):
        rows = [given] if isinstance(given, SpeculativeCache) else list(given.rows)
        if len(rows) != len(prompts):
            raise _other_rows(len(rows), len(prompts))
        return [_trimmed(cache, prompt, target) for cache, prompt in zip(rows, prompts, strict=True)]
    if isinstance(given, DynamicCache):
        if given.get_seq_length() == 0:
            return [target.cache(len(prompt)) for prompt in prompts]
        some: Any = next(layer for layer in given.layers if getattr(layer, "is_initialized", False))
        batch = int(some.keys.shape[0])
        if batch != len(prompts):
            raise _other_rows(batch, len(prompts))
        return [
            _trimmed(_copied(given, row, left, len(prompt), target), prompt, target)
            for row, (prompt, left) in enumerate(zip(prompts, padding, strict=True))
        ]
    raise UnsupportedGenerationError(
        f"past_key_values is a {type(given).__name__}, which cannot hold a draft tree.",
        "Pass a DynamicCache, or what an earlier call returned as past_key_values.",
    )


def _other_rows(found: int, wanted: int) -> InvalidInputError:
    return InvalidInputError(
        f"past_key_values holds {found} rows; there are {wanted} prompts.",
        "Pass the cache that was returned for the same batch.",
    )


def _trimmed(cache: SpeculativeCache, prompt: TokenArray, target: Target) -> SpeculativeCache:
    """The cache without what the prompt does not begin with; a new one where it cannot be taken off."""
    length = cache.get_seq_length()
    kept = min(length, len(prompt) - 1)
    if cache.text is not None and len(cache.text) == length:
        differs = np.flatnonzero(cache.text[:kept] != prompt[:kept])
        kept = int(differs[0]) if len(differs) else kept
    elif length > len(prompt):
        raise InvalidInputError(
            f"past_key_values holds {length} tokens, the prompt has {len(prompt)}.",
            "input_ids is the whole text, what is cached included.",
        )
    cache.drop()
    cache.text = None
    if kept < length:
        try:
            for layer in cache.layers:
                if isinstance(layer, SpeculativeLayer) and layer.is_initialized:
                    layer.crop(kept - length)
        except ValueError:  # it has left a sliding window
            return target.cache(len(prompt))
    return cache


def _copied(given: DynamicCache, row: int, left: int, length: int, target: Target) -> SpeculativeCache:
    """One row of a cache of transformers, its left padding stripped."""
    cache = target.cache(length + 64)
    for mine, theirs in zip(cache.layers, given.layers, strict=False):
        if not isinstance(mine, SpeculativeLayer) or not getattr(theirs, "is_initialized", False):
            continue
        if type(theirs) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedGenerationError(
                f"past_key_values has layers of type {type(theirs).__name__}.",
                "Pass a plain DynamicCache, or what an earlier call returned as past_key_values.",
            )
        layer: Any = theirs
        total = int(layer.get_seq_length())
        first = max(total - layer.keys.shape[-2], left)
        begin = first - (total - layer.keys.shape[-2])
        keys, values = layer.keys[row : row + 1, :, begin:], layer.values[row : row + 1, :, begin:]
        mine.load(keys, values, first - left)
    return cache


def write_back(cache: SpeculativeCache, given: DynamicCache) -> None:
    """Gives a caller's own cache of transformers what one row's holds, as `model.generate` would.

    Args:
        cache: Finished; its buffers are shared from now on.
        given: Empty, or the beginning of the same text.
    """
    for mine, theirs in zip(cache.layers, given.layers, strict=False):
        layer: Any = theirs
        if not isinstance(mine, SpeculativeLayer) or not mine.is_initialized:
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return
        keys, values = mine.keys, mine.values
        assert keys is not None
        assert values is not None
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = torch.clone(keys), torch.clone(values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = mine.length
