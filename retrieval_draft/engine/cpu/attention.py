"""Attention of bfloat16 models on the CPU, in float32, which torch computes several times faster there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from retrieval_draft.engine.substitution import is_ordinary_call, lend_attention

__all__ = ["WIDE_ATTENTION", "is_worthwhile", "wide_attention", "wide_attention_forward"]

WIDE_ATTENTION = "retrieval_draft_cpu"
"""The name of our attention in transformers' registry."""

_MAX_TOKENS = 64


def wide_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention with the interface of transformers' sdpa; few bfloat16 queries are computed in float32."""
    if query.dtype is torch.bfloat16 and query.shape[2] <= _MAX_TOKENS and is_ordinary_call(query):
        if attention_mask is not None and attention_mask.dtype is torch.bfloat16:
            attention_mask = attention_mask.float()
        out, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
        return out.to(torch.bfloat16), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(WIDE_ATTENTION, wide_attention_forward)
AttentionMaskInterface.register(WIDE_ATTENTION, sdpa_mask)


def is_worthwhile(model: Any) -> bool:
    """True if a model's attention is torch's, in bfloat16 on a CPU without instructions for it."""
    return (
        model.dtype is torch.bfloat16
        and model.device.type == "cpu"
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def wide_attention(model: Any) -> AbstractContextManager[str | None]:
    """Lends a model that uses torch's attention this one for the duration of the context."""
    return lend_attention(model, WIDE_ATTENTION, ("sdpa",))
