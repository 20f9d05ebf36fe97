"""Attention on CUDA in half precision, by kernels that need no plan for each new number of keys.

torch's own choice there is cuDNN first (torch 2.11 on an H200: 37 to 50 ms of host time for every number of
keys that it has not seen, and each decoding step brings a new one), and with a mask transformers copies all
keys and values once for each query head that shares them. Here one token, or a prompt, goes to
FlashAttention, which takes shared heads as they are, and a tree goes to the memory-efficient kernel with the
heads that share keys as a batch, so that nothing is copied.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from retrieval_draft.engine.substitution import is_ordinary_call, lend_attention

__all__ = [
    "CUDA_ATTENTION",
    "attend_grouped",
    "attend_unmasked",
    "can_attend_grouped",
    "cuda_attention",
    "group_heads",
    "ungroup_heads",
]

CUDA_ATTENTION = "retrieval_draft_cuda"
"""The name of this attention in transformers' registry."""

_LARGEST_HEAD = 256
"""Largest head of FlashAttention, in dimensions."""

_ALIGNED = 8
"""Divisor of the sizes of heads, and of rows of masks, that both kernels take."""


def attend_unmasked(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention in which each query sees all keys, or with `causal` the keys up to its own position.

    Args:
        query: (1, heads, n, dim), half precision, on CUDA.
        key: (1, key heads, keys, dim); n keys where it is causal.
        value: As `key`.
        causal: Whether query i sees keys 0..i only.
        scale: Of the products; None for 1 / sqrt(dim).

    Returns:
        (1, heads, n, dim).
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = attend(query, key, value, 0.0, causal, False, scale=scale)[0]
    return out


def attend_grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention under a mask, in which the query heads that share keys are a batch over them.

    Args:
        query: (1, heads, n, dim), half precision, on CUDA.
        key: (1, key heads, keys, dim).
        value: As `key`.
        mask: Additive, of the query's dtype, or bool, true for visible keys: (1, 1, n, keys).
        scale: Of the products; None for 1 / sqrt(dim).

    Returns:
        (1, heads, n, dim).

    Example:
        32 heads over 8 key heads: queries (4, 8, n, dim), keys (4, 8, keys, dim) with a stride of 0, no copy
    """
    states = group_heads(query, key, value)
    bias = _bias(mask, query.dtype).expand(*states[0].shape[:2], -1, -1)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return ungroup_heads(attend(*states, bias, False, 0.0, False, scale=scale)[0])


def group_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views in which the query heads that share keys are a batch over them: (groups, key heads, n, dim).

    Arguments are those of `attend_grouped`.
    """
    heads, nodes, size = query.shape[1:]
    shared = key.shape[1]
    groups = heads // shared
    return (
        query.view(shared, groups, nodes, size).transpose(0, 1),
        key.expand(groups, -1, -1, -1),
        value.expand(groups, -1, -1, -1),
    )


def ungroup_heads(out: Tensor) -> Tensor:
    """The result of attention over `group_heads` as (1, heads, n, dim of values)."""
    groups, shared, nodes, size = out.shape
    return out.transpose(0, 1).reshape(1, groups * shared, nodes, size)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add, its rows aligned; masks of `TreeAttention` are so already."""
    if mask.dtype == dtype and mask.stride(-2) % _ALIGNED == 0 and mask.storage_offset() % _ALIGNED == 0:
        return mask
    keys = mask.shape[-1]
    rows = mask.new_zeros((*mask.shape[:-1], -(-keys // _ALIGNED) * _ALIGNED), dtype=dtype)[..., :keys]
    if mask.dtype == torch.bool:
        return rows.masked_fill_(~mask, torch.finfo(dtype).min)
    return rows.copy_(mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the interface of transformers' sdpa, by the kernels of this module where they apply."""
    causal = query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if dropout or not _is_ours(query, key, value, attention_mask, bool(causal), kwargs):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    if attention_mask is None:
        out = attend_unmasked(query, key, value, bool(causal), scaling)
    else:
        out = attend_grouped(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def can_attend_grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> bool:
    """True if `attend_grouped` takes these: half precision, on CUDA, one row, sizes that fit its kernel."""
    return _is_ours(query, key, value, mask, False, {})


def _is_ours(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> bool:
    size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and key.dtype == value.dtype == query.dtype
        and query.shape[0] == 1
        and size == value.shape[-1]
        and size % _ALIGNED == 0
        and size <= _LARGEST_HEAD
        and is_ordinary_call(query)
        and kwargs.get("softcap") is None
        and kwargs.get("position_bias") is None
        and (not causal or query.shape[2] == key.shape[2] if mask is None else mask.shape[:2] == (1, 1))
    )


AttentionInterface.register(CUDA_ATTENTION, _attend)
AttentionMaskInterface.register(CUDA_ATTENTION, sdpa_mask)


def cuda_attention(model: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Lends a model on a card that has these kernels this attention for the duration of the context."""
    return lend_attention(model, CUDA_ATTENTION, ("sdpa",)) if _has_kernels(device) else nullcontext()


@cache
def _has_kernels(device: torch.device) -> bool:
    """True if a device is an NVIDIA card of compute capability 8.0 or more, as FlashAttention needs it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
