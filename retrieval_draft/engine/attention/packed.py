"""Attention of a pass over several requests' trees: each request's queries on its own keys."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrieval_draft.engine.attention.cuda import CUDA_ATTENTION
from retrieval_draft.engine.cache.packed_cache import PackedCache
from retrieval_draft.engine.cpu.attention import WIDE_ATTENTION
from retrieval_draft.engine.substitution import lend_attention

__all__ = ["PACKED_ATTENTION", "can_pack", "packed_attention"]

PACKED_ATTENTION = "retrieval_draft_packed"
"""The name of this attention in transformers' registry."""

_BASES = ("sdpa", WIDE_ATTENTION, CUDA_ATTENTION)
"""Attentions that can be called request by request."""


class _Here(threading.local):
    """The packed pass of this thread; other threads may use the same model without one meanwhile."""

    cache: PackedCache | None = None
    base: Callable[..., tuple[Tensor, Any]] = staticmethod(sdpa_attention_forward)


_here = _Here()


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Replaces the model's own attention; works request by request during a packed pass."""
    cache, base = _here.cache, _here.base
    layer = None if cache is None else cache.layer_of(key)
    if cache is None or layer is None:
        return base(module, query, key, value, attention_mask, **kwargs)[0], None
    parts = []
    begin = 0
    for (keys, values), mask, size in zip(layer.views, layer.masks, cache.sizes, strict=True):
        part = query.narrow(2, begin, size)
        parts.append(base(module, part, keys, values, mask, **kwargs)[0])
        begin += size
    return torch.cat(parts, 1), None


AttentionInterface.register(PACKED_ATTENTION, _attend)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def can_pack(model: Any) -> bool:
    """True if a model's attention, as it is set now, is one that this one can replace."""
    text = model.config.get_text_config(decoder=True)
    return text._attn_implementation in (*_BASES, PACKED_ATTENTION)


@contextmanager
def packed_attention(model: Any, cache: PackedCache) -> Iterator[None]:
    """Makes this thread's passes of the model attend to the keys of `cache` inside the context."""
    with lend_attention(model, PACKED_ATTENTION, _BASES) as before:
        assert before is not None, "can_pack says whether it can stand in"
        _here.cache, _here.base = cache, ALL_ATTENTION_FUNCTIONS[before]
        try:
            yield
        finally:
            _here.cache = None
