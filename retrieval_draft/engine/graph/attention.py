"""Attention of passes of fixed shape: by the kernel for trees where there is one, else under a mask.

Under a mask the heads that share keys are a batch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from retrieval_draft.engine.attention.cuda import (
    CUDA_ATTENTION,
    attend_grouped,
    can_attend_grouped,
    group_heads,
    ungroup_heads,
)
from retrieval_draft.engine.cpu.attention import WIDE_ATTENTION
from retrieval_draft.engine.substitution import lend_attention

__all__ = [
    "GRAPH_ATTENTION",
    "GRAPH_ATTENTION_EAGER",
    "PassTree",
    "attend_in_full",
    "attending_to",
    "can_attend_to_trees",
    "graph_attention",
]

GRAPH_ATTENTION = "retrieval_draft_graph"
"""The name in transformers' registry of the attention in place of "sdpa"."""

GRAPH_ATTENTION_EAGER = "retrieval_draft_graph_eager"
"""The name of the attention in place of "eager", which minds soft caps and sinks."""

_LARGEST_HEAD = 256
"""Dimensions, beyond which the sums of the kernel for trees do not stay in registers."""


@dataclass
class PassTree:
    """The trees of a pass, one a row, as the kernel for trees reads them in place of masks.

    Attributes:
        length: int64, shape (rows,). Committed tokens of each row.
        depths: int64, shape (rows, n). Of the nodes.
        hidden: bool, shape (rows, n, n). [r, i, j] true where node i of row r must not see its node j; None
            for roots alone.
        windows: Windows by the address of the first element of their masks.
        reads: Layers that have read it so far.
    """

    length: Tensor
    depths: Tensor
    hidden: Tensor | None
    windows: Mapping[int, int | None]
    reads: int = 0


_here = threading.local()
"""`tree`: the tree of the pass that this thread makes."""


@contextmanager
def attending_to(tree: PassTree) -> Iterator[None]:
    """Has attention under a mask of this tree read the tree instead, where the kernel for that can run."""
    _here.tree = tree
    try:
        yield
    finally:
        _here.tree = None


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """The kernel for trees; None without Triton, which comes with torch for CUDA."""
    try:
        from retrieval_draft.engine.graph.tree_attention import tree_attention
    except ImportError:
        return None
    found: Callable[..., Tensor] = tree_attention
    return found


def can_attend_to_trees(dtype: torch.dtype, device: torch.device) -> bool:
    """True where the kernel for trees runs: in half precision on a card, or by Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        here = device.type == "cpu" and dtype == torch.float32
    else:
        here = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return here and _kernel() is not None


def _attend_to_tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor | None:
    """As `attend_in_full`, by the kernel for trees; None where it does not apply."""
    tree: PassTree | None = getattr(_here, "tree", None)
    if tree is None or mask is None or mask.data_ptr() not in tree.windows:
        return None
    states = (query, key, value)
    applies = (
        (query.shape[0], query.shape[2]) == tree.depths.shape
        and mask.shape[-1] == key.shape[2]
        and all(each.stride(-1) == 1 and each.shape[-1] <= _LARGEST_HEAD for each in states)
        and len({each.dtype for each in states}) == 1
        and can_attend_to_trees(query.dtype, query.device)
    )
    kernel = _kernel()
    if not applies or kernel is None:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = tree.windows[mask.data_ptr()]
    tree.reads += 1
    return kernel(*states, tree.length, tree.depths, tree.hidden, scale, window, softcap, sinks)


def attend_in_full(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention with all scores in memory.

    Args:
        query: (rows, heads, n, dim).
        key: (rows, key heads, keys, dim).
        value: (rows, key heads, keys, dim of values).
        mask: Additive, or bool, true for visible keys: (rows or 1, 1, n, keys). None where all are visible.
        scale: Of the products.
        softcap: Limit of the scores, which near it smoothly.
        sinks: (heads,). Scores of a key without a value, which takes its share of each query.

    Returns:
        (rows, heads, n, dim of values).
    """
    rows, heads, nodes = query.shape[:3]
    shared = key.shape[1]
    grouped = query.reshape(rows, shared, heads // shared * nodes, query.shape[-1])
    scores = (grouped @ key.transpose(-1, -2)).view(rows, shared, heads // shared, nodes, -1) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        mask = mask[:, :, None]
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.view(shared, -1, 1, 1).expand(rows, -1, -1, nodes, -1).to(scores.dtype)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    out = weights.reshape(rows, shared, heads // shared * nodes, -1) @ value
    return out.view(rows, heads, nodes, value.shape[-1])


def _attend_rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """As `attend_in_full`, of several rows: the query heads that share keys are one after the other."""
    rows, heads, nodes, dim = query.shape
    shared = key.shape[1]
    masks = mask[:, :, None].expand(-1, -1, heads // shared, -1, -1).reshape(rows, 1, -1, mask.shape[-1])
    grouped = query.reshape(rows, shared, heads // shared * nodes, dim)
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=masks, scale=scale)
    return out.reshape(rows, heads, nodes, value.shape[-1])


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In place of "sdpa"; what is not a pass of ours, as in another thread, goes there."""
    ours = attention_mask is not None and attention_mask.shape[:2] == (query.shape[0], 1)
    if not ours or dropout or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is not None
    by_tree = _attend_to_tree(query, key, value, attention_mask, scaling)
    if by_tree is not None:
        out = by_tree
    elif len(query) > 1:
        out = _attend_rows(query, key, value, attention_mask, scaling)
    elif can_attend_grouped(query, key, value, attention_mask):
        out = attend_grouped(query, key, value, attention_mask, scaling)
    else:
        states = group_heads(query, key, value)
        out = ungroup_heads(scaled_dot_product_attention(*states, attn_mask=attention_mask, scale=scaling))
    return out.transpose(1, 2).contiguous(), None


def _attend_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In place of "eager"."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not dropout:
        by_tree = _attend_to_tree(query, key, value, attention_mask, scale, softcap, s_aux)
        if by_tree is not None:
            return by_tree.transpose(1, 2).contiguous(), None
    out = attend_in_full(query, key, value, attention_mask, scale, softcap, s_aux)
    return drop(out, dropout, module.training and dropout > 0).transpose(1, 2).contiguous(), None


AttentionInterface.register(GRAPH_ATTENTION, _attend)
AttentionMaskInterface.register(GRAPH_ATTENTION, sdpa_mask)
AttentionInterface.register(GRAPH_ATTENTION_EAGER, _attend_eager)
AttentionMaskInterface.register(GRAPH_ATTENTION_EAGER, eager_mask)


def graph_attention(model: Any) -> AbstractContextManager[Any]:
    """Lends a model the attention of these two that does what its own does; it may have neither's."""
    eager = model.config.get_text_config(decoder=True)._attn_implementation in (
        "eager",
        GRAPH_ATTENTION_EAGER,
    )
    if eager:
        return lend_attention(model, GRAPH_ATTENTION_EAGER, ("eager",))
    return lend_attention(model, GRAPH_ATTENTION, ("sdpa", WIDE_ATTENTION, CUDA_ATTENTION))
