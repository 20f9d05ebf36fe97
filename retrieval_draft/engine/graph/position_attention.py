"""Attention whose sums depend on the positions of a query and its keys alone, never on slots or neighbours.

A drafted token lies in whichever slot its tree gives it; once accepted it lies where its position is. Kernels
that split or add up keys by slot round the two differently, so that half precision shows drafts in the text.
Here the keys of a node are read in the order of their positions, and these invariants hold:

1. Which of two rules computes a key depends on both positions only. With passes of n nodes, keys of blocks of
   n positions from the block of `query - (n - 1)` on are *near*, all before are *far*. A tree of n nodes is
   at most n - 1 deep, so that far keys are always committed text, and those of a draft are always near.
2. Far keys are multiplied in blocks of `FAR` positions that all nodes share, in products of one shape. A node
   that does not see a key gives it the weight exp(-inf) = 0, and 0 times its value, which is finite, adds an
   exact 0: the sum is that of the seen keys in their order. A block without seen keys leaves maximum, total
   and sums as they are, bit for bit, so the number of blocks does not matter.
3. Near keys are gathered for each node by position: committed ones from their slots, ancestors from theirs.
   Position p is in column p - base of the products, in whichever slot it lies, and columns that are not seen
   weigh an exact 0.
4. Blocks are added up one after another, far ones first, each by a step of the same form (softmax with a
   running maximum), in float32 or more.

One thing is left to the library: a row of a product of fixed shape must not depend on its index or on the
other rows. `retrieval_draft.engine.row_invariance` tests that on the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrieval_draft.engine.attention.cuda import CUDA_ATTENTION
from retrieval_draft.engine.cpu.attention import WIDE_ATTENTION
from retrieval_draft.engine.graph.attention import GRAPH_ATTENTION, GRAPH_ATTENTION_EAGER
from retrieval_draft.engine.substitution import lend_attention
from retrieval_draft.errors import UnsupportedModelError

__all__ = ["FAR", "PositionLayout", "attend_by_position", "attending_by_position", "position_attention"]

FAR = 256
"""Positions of a block of far keys."""

_ATTENTION = "retrieval_draft_position"
"""The name in transformers' registry of the attention in place of "sdpa"."""

_ATTENTION_EAGER = "retrieval_draft_position_eager"
"""The name of the attention in place of "eager", which minds soft caps and sinks."""


@dataclass
class PositionLayout:
    """The keys of each node, by position.

    Attributes:
        near_slots: int64, shape (n, 2n). Slots of the near positions, from `base` on; the node's own for
            those that it does not see.
        near_seen: bool, shape (n, 2n), for each window.
        far_seen: bool, shape (n, keys), for each window.
        uncommitted: bool, shape (keys, 1). Slots whose values no node may read as far ones.
        keys: Positions that far blocks cover, a multiple of `FAR`.
        masks: Windows by the address of the first element of the masks that the model is given.
        reads: Attentions that have read it so far.

    Example:
        n = 4, 9 committed tokens, a root with children 1 and 2, and 3 below 2, its position 11: `base` is 8;
        near positions are 8 to 15, of which 3 sees 8, 9, 10, 11 in slots 8, 9, 11, 12
    """

    near_slots: Tensor
    near_seen: Mapping[int | None, Tensor]
    far_seen: Mapping[int | None, Tensor]
    uncommitted: Tensor
    keys: int
    masks: Mapping[int, int | None]
    reads: int = 0

    @classmethod
    def of_tree(
        cls, length: Tensor, depths: Tensor, hidden: Tensor, keys: int, masks: Mapping[int, int | None]
    ) -> PositionLayout:
        """The layout of a padded tree, made on the device, in calls that a capture can hold.

        Args:
            length: int64, shape (1,). Committed tokens.
            depths: int64, shape (n,). Of the nodes.
            hidden: bool, shape (n, n). [i, j] true where node i must not see node j.
            keys: As the attribute.
            masks: As the attribute.
        """
        nodes, device = len(depths), depths.device
        index = torch.arange(nodes, device=device)
        position = (length + depths)[:, None]
        base = (position - (nodes - 1)).clamp(min=0)
        base = base - base % nodes
        near = base + torch.arange(2 * nodes, device=device)
        # [i, t]: the node at depth t that node i sees.
        is_at = ~hidden[:, :, None] & (depths[None, :, None] == index)
        ancestors = is_at.to(torch.uint8).argmax(1)
        depth = near - length
        drafted = length + ancestors.gather(1, depth.clamp(0, nodes - 1))
        seen = near <= position
        slots = torch.where(seen, torch.where(depth < 0, near, drafted), length + index[:, None])
        columns = torch.arange(keys, device=device)
        near_seen: dict[int | None, Tensor] = {}
        far_seen: dict[int | None, Tensor] = {}
        for window in set(masks.values()):
            near_seen[window], far_seen[window] = seen, columns < base
            if window is not None:
                near_seen[window] = seen & (position - near < window)
                far_seen[window] = far_seen[window] & (position - columns < window)
        return cls(slots, near_seen, far_seen, (columns >= length)[:, None], keys, masks)


def attend_by_position(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PositionLayout,
    window: int | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the nodes of a tree.

    Args:
        query: (1, heads, n, dim).
        key: (1, key heads, slots, dim). Slot s holds position s of the committed text; node i is in slot
            length + i.
        value: (1, key heads, slots, dim of values).
        layout: Of the tree; it covers the committed text.
        window: Positions that a node sees, itself included; None for all.
        scale: Of the products.
        softcap: Limit of the scores, which near it smoothly.
        sinks: (heads,). Scores of a key without a value, which takes its share of each query.

    Returns:
        (1, heads, n, dim of values).
    """
    heads, nodes, dim = query.shape[1:]
    shared, width = key.shape[1], value.shape[-1]
    groups = heads // shared
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query[0].to(wide).view(shared, groups, nodes, dim)
    running = _RunningSoftmax(grouped, width, sinks)

    def scores(products: Tensor, seen: Tensor) -> Tensor:
        products = products * scale
        if softcap is not None:
            products = torch.tanh(products / softcap) * softcap
        return products.masked_fill(~seen, float("-inf"))

    rows = grouped.reshape(shared, groups * nodes, dim)
    for begin in range(0, layout.keys, FAR):
        block = slice(begin, begin + FAR)
        keys = key[0, :, block].to(wide)
        values = value[0, :, block].to(wide).masked_fill(layout.uncommitted[block], 0.0)
        products = (rows @ keys.transpose(-1, -2)).view(shared, groups, nodes, FAR)
        weights = running.add(scores(products, layout.far_seen[window][:, block]))
        running.sums += (weights.view(shared, groups * nodes, FAR) @ values).view_as(running.sums)
    # (key heads, n, 2n, dim): of each node the keys that it sees.
    keys, values = (
        states[0].index_select(1, layout.near_slots.flatten()).to(wide).view(shared, nodes, 2 * nodes, -1)
        for states in (key, value)
    )
    products = (grouped.transpose(1, 2) @ keys.transpose(-1, -2)).transpose(1, 2)
    weights = running.add(scores(products, layout.near_seen[window]))
    running.sums += (weights.transpose(1, 2) @ values).transpose(1, 2)
    # A sum that underflows to -0.0 stays so, or not, by the number of blocks without seen keys.
    out = running.sums / running.totals[..., None] + 0.0
    return out.view(1, heads, nodes, width).to(query.dtype)


class _RunningSoftmax:
    """Sums of values under a softmax of which one block of scores after another becomes known.

    Attributes:
        sums: (key heads, groups, n, dim of values). Callers add what `add` weighs.
        totals: (key heads, groups, n). Of the weights.
    """

    def __init__(self, grouped: Tensor, width: int, sinks: Tensor | None) -> None:
        shape = grouped.shape[:3]
        if sinks is None:
            self._maxima = grouped.new_full(shape, float("-inf"))
            self.totals = grouped.new_zeros(shape)
        else:
            self._maxima = sinks.to(grouped.dtype).view(*shape[:2], 1).expand(shape)
            self.totals = grouped.new_ones(shape)
        self.sums = grouped.new_zeros((*shape, width))

    def add(self, scores: Tensor) -> Tensor:
        """Takes a block of scores, (key heads, groups, n, keys), -inf where unseen.

        Returns:
            Weights of the block's values, of the same shape.
        """
        larger = torch.maximum(self._maxima, scores.amax(-1))
        finite = larger.masked_fill(larger == float("-inf"), 0.0)
        weights = (scores - finite[..., None]).exp()
        shrink = (self._maxima - finite).exp()
        self._maxima = larger
        self.totals = self.totals * shrink + weights.sum(-1)
        self.sums = self.sums * shrink[..., None]
        return weights


_here = threading.local()
"""`layout`: of the pass that this thread makes."""


@contextmanager
def attending_by_position(layout: PositionLayout) -> Iterator[None]:
    """Has this thread's attention, inside of `position_attention`, read the layout."""
    _here.layout = layout
    try:
        yield
    finally:
        _here.layout = None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    eager: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In place of "sdpa" or "eager"; passes of other threads go to what graphs have there."""
    layout: PositionLayout | None = getattr(_here, "layout", None)
    if layout is None:
        usual = ALL_ATTENTION_FUNCTIONS[GRAPH_ATTENTION_EAGER if eager else GRAPH_ATTENTION]
        out: tuple[Tensor, None] = usual(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return out
    if (
        attention_mask is None
        or attention_mask.data_ptr() not in layout.masks
        or key.shape[2] < layout.keys
        or query.shape[:1] + query.shape[2:3] != (1, len(layout.near_slots))
        or dropout
        or kwargs.get("position_bias") is not None
    ):
        raise UnsupportedModelError(
            f"{type(module).__name__} changes the mask or the keys before it attends to them, so that its "
            "sums cannot be made by position.",
            "Leave out exact='bitwise' for this model.",
        )
    window = layout.masks[attention_mask.data_ptr()]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sinks = (kwargs.get("softcap"), kwargs.get("s_aux")) if eager else (None, None)
    layout.reads += 1
    attended = attend_by_position(query, key, value, layout, window, scale, softcap, sinks)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
AttentionInterface.register(_ATTENTION_EAGER, partial(_attend, eager=True))
AttentionMaskInterface.register(_ATTENTION_EAGER, eager_mask)


def position_attention(model: Any) -> AbstractContextManager[str | None]:
    """Lends a model the attention of these two that does what its own does."""
    text = model.config.get_text_config(decoder=True)
    if text._attn_implementation in ("eager", _ATTENTION_EAGER):
        return lend_attention(model, _ATTENTION_EAGER, ("eager",))
    return lend_attention(model, _ATTENTION, ("sdpa", WIDE_ATTENTION, CUDA_ATTENTION))
