"""Caches that callers pass in and get back: a conversation's keys and values from one call to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from retrieval_draft.engine.cache.chain_cache import ChainCache
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache, SpeculativeLayer
from retrieval_draft.engine.compat import has_length, is_empty
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError
from retrieval_draft.index.source import TokenArray

__all__ = ["CacheRows", "RowCache", "adopt", "copied_row", "write_back"]

RowCache = SpeculativeCache | ChainCache
"""The cache of one row, of trees or of chains."""


class CacheRows(Cache):
    """The caches of a batch, one for each row, to be passed to the drafter again.

    Args:
        rows: In the order of the sequences they belong to.
    """

    def __init__(self, rows: Sequence[RowCache]) -> None:
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
) -> list[RowCache]:
    """Caches that begin each row, from the caller's ``cache`` or ``past_key_values``.

    A cache that this package made records its text: tokens beyond the common beginning with the prompt are
    removed, so that an edited conversation is right too. A cache of transformers is trusted, and copied.

    Args:
        given: A `RowCache`, a `CacheRows` or a ``DynamicCache`` of transformers.
        prompts: int32, shape (length,) each. Whole texts, cached tokens included, padding stripped.
        padding: Tokens that were stripped from each.
        target: The model.

    Returns:
        One cache for each prompt, each at least a token shorter than its prompt.

    Raises:
        InvalidInputError: It holds other rows or more text than the prompts.
        UnsupportedGenerationError: It is of another type.
    """
    if isinstance(given, (SpeculativeCache, ChainCache, CacheRows)):
        rows = list(given.rows) if isinstance(given, CacheRows) else [given]
        if len(rows) != len(prompts):
            raise _other_rows(len(rows), len(prompts))
        return [_trimmed(cache, prompt, target) for cache, prompt in zip(rows, prompts, strict=True)]
    if isinstance(given, DynamicCache):
        if is_empty(given):
            return [target.cache(len(prompt), _keeps_all(given)) for prompt in prompts]
        if target.verification.way == "chain":
            return [_taken_over(given, prompts, padding, target)]
        some: Any = next(layer for layer in given.layers if getattr(layer, "is_initialized", False))
        batch = int(some.keys.shape[0])
        if batch != len(prompts):
            raise _other_rows(batch, len(prompts))
        rows = [
            _copied(given, row, left, prompt, target)
            for row, (prompt, left) in enumerate(zip(prompts, padding, strict=True))
        ]
        for cache in rows:
            # The longest row chose the rotary factors of all.
            cache.made_for(int(given.get_seq_length()) - min(padding))
        return rows
    raise UnsupportedGenerationError(
        f"The cache is a {type(given).__name__}, which cannot hold a draft tree.",
        "Pass a DynamicCache, or what an earlier call returned.",
    )


def _other_rows(found: int, wanted: int) -> InvalidInputError:
    return InvalidInputError(
        f"The cache holds {found} rows; there are {wanted} prompts.",
        "Pass the cache that was returned for the same batch.",
    )


def _trimmed(cache: RowCache, prompt: TokenArray, target: Target) -> RowCache:
    """The cache cropped to the prompt's beginning; a new one where a window has left that."""
    cache.drop()
    if len(cache.text) < cache.fixed or (cache.text[: cache.fixed] != prompt[: cache.fixed]).any():
        raise InvalidInputError(
            f"The cache begins with {cache.fixed} tokens that hold images, the prompt with others.",
            "Pass the whole conversation, or pass its images again and leave the cache out.",
        )
    known = min(len(cache.text), cache.get_seq_length(), len(prompt) - 1)
    differs = np.flatnonzero(cache.text[:known] != prompt[:known])
    if cache.keep(int(differs[0]) if len(differs) else known):
        return cache
    fresh: RowCache = target.cache(len(prompt))
    return fresh


def _taken_over(
    given: DynamicCache, prompts: Sequence[TokenArray], padding: Sequence[int], target: Target
) -> RowCache:
    """A copy of a caller's cache of one text, as it is."""
    if len(prompts) > 1 or padding[0] or not has_length(given):
        raise UnsupportedGenerationError(
            "The cache holds several texts, padding, or states that do not tell their text's length: not "
            "supported for a model that drafts are verified for in chains.",
            "Pass what an earlier call returned, or the rows one by one without padding.",
        )
    prompt, length = prompts[0], int(given.get_seq_length())
    if length > len(prompt):
        raise _too_long(length, len(prompt))
    cache = target.cache(len(prompt))
    cache.load(given, length)
    # The last token of the prompt is passed again, for its logits.
    taken: RowCache = cache if cache.keep(min(length, len(prompt) - 1)) else target.cache(len(prompt))
    return taken


def _too_long(cached: int, length: int) -> InvalidInputError:
    return InvalidInputError(
        f"The cache holds {cached} tokens, the prompt has {length}.",
        "input_ids is the whole text, what is cached included.",
    )


def _keeps_all(given: DynamicCache) -> bool:
    """True if a cache was made without a configuration: it has no windows, and keeps all keys."""
    return not any(isinstance(layer, DynamicSlidingWindowLayer) for layer in given.layers)


def _copied(given: DynamicCache, row: int, left: int, prompt: TokenArray, target: Target) -> SpeculativeCache:
    """One row of a cache of transformers, its left padding stripped."""
    length = int(given.get_seq_length()) - left
    if length > len(prompt):
        raise _too_long(length, len(prompt))
    cache = copied_row(given, row, left, target, len(prompt) + 64)
    # The last token of the prompt is passed again, for its logits.
    fresh: SpeculativeCache = target.cache(len(prompt))
    return cache if cache.keep(min(length, len(prompt) - 1)) else fresh


def copied_row(given: DynamicCache, row: int, left: int, target: Target, capacity: int) -> SpeculativeCache:
    """All of one row of a cache of transformers, its left padding stripped.

    Args:
        given: Holds text.
        row: Index in the batch.
        left: Padding before the text.
        target: The model.
        capacity: Tokens to make room for.

    Raises:
        UnsupportedGenerationError: A layer is of another type than those that the drafter's caches replace.
    """
    cache: SpeculativeCache = target.cache(capacity, _keeps_all(given))
    for mine, theirs in zip(cache.layers, given.layers, strict=False):
        if not isinstance(mine, SpeculativeLayer) or not getattr(theirs, "is_initialized", False):
            continue
        if type(theirs) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedGenerationError(
                f"The cache has layers of type {type(theirs).__name__}.",
                "Pass a plain DynamicCache, or what an earlier call returned.",
            )
        layer: Any = theirs
        total = int(layer.get_seq_length())
        first = max(total - layer.keys.shape[-2], left)
        begin = first - (total - layer.keys.shape[-2])
        keys, values = layer.keys[row : row + 1, :, begin:], layer.values[row : row + 1, :, begin:]
        mine.load(keys, values, first - left)
    return cache


def write_back(cache: RowCache, given: DynamicCache, left: int) -> None:
    """Writes one row's keys and values to a caller's own cache of transformers, as `model.generate` would.

    Args:
        cache: Finished.
        given: Empty, or the beginning of the same text.
        left: Padding before the text, which gets slots of zeros: no token attends to them.
    """
    if isinstance(cache, ChainCache):
        cache.write_to(given)
        return
    replicated: Any = getattr(given, "layer_class_to_replicate", None)
    while replicated is not None and len(given.layers) < len(cache.layers):
        given.layers.append(replicated())
    for mine, theirs in zip(cache.layers, given.layers, strict=False):
        layer: Any = theirs
        if not isinstance(mine, SpeculativeLayer) or not mine.is_initialized:
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return
        slides = isinstance(layer, DynamicSlidingWindowLayer)
        held = mine.held() if mine.start == 0 and not slides else (mine.keys, mine.values)
        keys, values = held
        assert keys is not None
        assert values is not None
        padding = min(left, layer.sliding_window - 1 - keys.shape[-2]) if slides else left
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = (_behind_zeros(states, max(padding, 0)) for states in (keys, values))
        if slides:
            layer.cumulative_length = mine.length + left


def _behind_zeros(states: Tensor, count: int) -> Tensor:
    """A copy of keys or values, (batch, heads, tokens, dim), with `count` slots of zeros before them."""
    return torch.cat([states.new_zeros((*states.shape[:2], count, states.shape[-1])), states], -2)
