"""Decoder layers of heads, over the rows of several texts at once, and their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retrieval_draft.engine.draft_models.expansion import Growth

__all__ = ["DraftLayer", "KeyValues", "KeyedState", "Packed", "RmsNorm", "ancestors", "causal", "move_head"]

_ROOM = 256
"""Rows that buffers make room for at once."""


class KeyValues:
    """Keys and values of one text in all layers of a head, and of nodes after it.

    Args:
        layers: Number of layers.

    Attributes:
        length: Rows of the text.
        staged: Nodes after them.
        position: Position of the row after the last.

    Example:
        2 rows, then 3 nodes: `append` writes at 0..1, then at 2..4; `drop` forgets the latter
    """

    def __init__(self, layers: int) -> None:
        self.length = self.staged = self.position = 0
        self._buffers: list[Tensor | None] = [None] * layers

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (heads, n, d) each after all that is there.

        Returns:
            (heads, length + staged + n, d) each, all of the layer's.
        """
        begin = self.length + self.staged
        end = begin + keys.shape[1]
        buffer = self._buffers[layer]
        if buffer is None or buffer.shape[2] < end:
            grown = keys.new_empty((2, keys.shape[0], max(end, begin * 2) + _ROOM, keys.shape[2]))
            if buffer is not None:
                grown[:, :, :begin] = buffer[:, :, :begin]
            buffer = self._buffers[layer] = grown
        buffer[0, :, begin:end], buffer[1, :, begin:end] = keys, values
        return buffer[0, :, :end], buffer[1, :, :end]

    def copy(self, rows: int) -> KeyValues:
        """The first `rows` rows, with memory of their own."""
        other = KeyValues(len(self._buffers))
        other.length, other.position = rows, self.position - self.length + rows
        other._buffers = [None if each is None else each[:, :, :rows].clone() for each in self._buffers]
        return other

    def drop(self) -> None:
        """Forgets the nodes."""
        self.staged = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(each.nbytes for each in self._buffers if each is not None)


class KeyedState:
    """State of one text in a head that keeps keys and values; subclasses add what they guess from.

    Attributes:
        keys: Of the text.
    """

    def __init__(self, keys: KeyValues) -> None:
        self.keys = keys

    @property
    def length(self) -> int:
        """Rows of the text."""
        return self.keys.length

    def copy(self, rows: int) -> Any:
        """The state after the first `rows` rows, with memory of its own."""
        return type(self)(self.keys.copy(rows))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes


class Packed(NamedTuple):
    """Rows of several texts that pass together, one text after the other.

    Attributes:
        caches: Keys and values of each text.
        masks: bool, (rows of the text, its keys), for each; None where every key is seen.
        counts: Rows of each.
        factors: Cosines and sines of the rows' positions, (n, d) each.
    """

    caches: Sequence[KeyValues]
    masks: Sequence[Tensor | None]
    counts: Sequence[int]
    factors: tuple[Tensor, Tensor]


class RmsNorm(nn.Module):
    """Root mean square norm in float32, as in Llama."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32, device="cpu"))
        self._eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """Normalises the last axis."""
        wide = states.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)).to(
            states.dtype
        )


class _Attention(nn.Module):
    """Attention of rows to their own text's keys."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        size, bias = config.hidden_size, bool(getattr(config, "attention_bias", False))
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._dim = getattr(config, "head_dim", None) or size // self._heads
        self.q_proj = nn.Linear(width, self._heads * self._dim, bias=bias)
        self.k_proj = nn.Linear(width, self._groups * self._dim, bias=bias)
        self.v_proj = nn.Linear(width, self._groups * self._dim, bias=bias)
        self.o_proj = nn.Linear(self._heads * self._dim, size, bias=bias and config.model_type != "qwen3")
        normed = config.model_type == "qwen3"
        self.q_norm = RmsNorm(self._dim, config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RmsNorm(self._dim, config.rms_norm_eps) if normed else nn.Identity()

    def append(self, states: Tensor, layer: int, packed: Packed) -> list[tuple[Tensor, Tensor]]:
        """Writes the rows' keys and values; all of each text's, (heads, keys, d) each."""
        key = self.k_norm(self.k_proj(states).view(len(states), self._groups, self._dim))
        key = _rotated(key, packed.factors).transpose(0, 1)
        value = self.v_proj(states).view(len(states), self._groups, self._dim).transpose(0, 1)
        parts = zip(
            packed.caches, *(each.split(list(packed.counts), 1) for each in (key, value)), strict=True
        )
        return [cache.append(layer, k, v) for cache, k, v in parts]

    def forward(self, states: Tensor, layer: int, packed: Packed) -> Tensor:
        query = self.q_norm(self.q_proj(states).view(len(states), self._heads, self._dim))
        query = _rotated(query, packed.factors).transpose(0, 1)
        parts = []
        for mask, q, (keys, values) in zip(
            packed.masks,
            query.split(list(packed.counts), 1),
            self.append(states, layer, packed),
            strict=True,
        ):
            shared = self._heads // self._groups
            part = nn.functional.scaled_dot_product_attention(
                q[None],
                keys[None].repeat_interleave(shared, 1),
                values[None].repeat_interleave(shared, 1),
                mask,
            )
            parts.append(part[0].transpose(0, 1))
        out: Tensor = self.o_proj(torch.cat(parts).reshape(len(states), -1))
        return out


class _Mlp(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        size, inner = config.hidden_size, config.intermediate_size
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)
        self._act = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self._act(self.gate_proj(states)) * self.up_proj(states))
        return out


class DraftLayer(nn.Module):
    """A layer of Llama or Qwen 3, with its weights under their names.

    Args:
        config: That of the head's layers.
        width: Columns of what attention reads: more than the residual's where it reads embeddings too.
        has_norm: Whether it normalises its input itself; EAGLE's first layer does not.
    """

    def __init__(self, config: Any, width: int, has_norm: bool = True) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = _Attention(config, width)
        self.mlp = _Mlp(config)
        self.input_layernorm = RmsNorm(size, eps) if has_norm else nn.Identity()
        self.post_attention_layernorm = RmsNorm(size, eps)

    def forward(self, states: Tensor, taken: Tensor, layer: int, packed: Packed) -> Tensor:
        """States after the layer.

        Args:
            states: (rows of all texts, d). The residual.
            taken: (rows of all texts, width). Input of attention, normalised.
            layer: Its index in the caches.
            packed: The texts.
        """
        states = states + self.self_attn(taken, layer, packed)
        out: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return out


def move_head(head: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves a head to the target's device, and its weights to the target's dtype.

    Buffers that a checkpoint does not hold stay as they are: frequencies of rotary factors that were rounded
    to half precision are those of other positions.
    """
    head.to(device)
    for weight in head.state_dict(keep_vars=True).values():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)


def causal(cache: KeyValues, rows: int, device: Any) -> Tensor | None:
    """bool, (rows, length + rows): each row sees the text and the rows up to itself; None for one."""
    if rows == 1:
        return None
    return torch.ones(rows, cache.length + rows, dtype=torch.bool, device=device).tril(cache.length)


def ancestors(cache: KeyValues, growth: Growth, device: Any) -> Tensor:
    """bool, (nodes, length + staged + nodes): nodes of a frontier see the text, their ancestors, themselves.

    Example:
        text of 2 rows, node 1 staged, frontier 3 (below 1) and 5 (below the root): 1 1 1 1 0 and 1 1 0 0 1
    """
    slots = {node: cache.length + at for at, node in enumerate(growth.expanded[1:])}
    mask = torch.zeros(len(growth.frontier), cache.length + len(slots), dtype=torch.bool, device="cpu")
    mask[:, : cache.length] = True
    for row, frontier_node in enumerate(growth.frontier):
        node = frontier_node
        while node:
            mask[row, slots[node]] = True
            node = growth.parents[node]
    return mask.to(device)


def _rotated(states: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """States, (n, heads, d), turned by rotary factors, (n, d) each."""
    cos, sin = (each[:, None].to(states.dtype) for each in factors)
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin
