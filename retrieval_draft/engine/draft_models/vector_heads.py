"""Heads that carry one vector along a path, and read nothing of a text but its last row.

Medusa (arXiv:2401.10774) guesses each further token from the target's last state alone; IBM's speculator
(arXiv:2404.19124) from a state to which each token is added.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, Growth
from retrieval_draft.engine.draft_models.vocab_trim import VocabTrim
from retrieval_draft.engine.hidden_states import LAST

__all__ = ["MedusaHead", "MlpSpeculator", "VectorHead"]


class _State:
    """The vectors at the nodes that were expanded last: (nodes, d)."""

    length = 0
    nbytes = 0

    def __init__(self) -> None:
        self.nodes: list[int] = []
        self.vectors: Tensor

    def copy(self, rows: int) -> _State:
        return _State()


class VectorHead(nn.Module, ABC):
    """A head of which every level has weights of its own.

    Args:
        depth: Number of levels.
        limits: Limits on the growth of its trees; their depth is that of the head at most.
    """

    layers: tuple[int, ...] = (LAST,)
    reads_all = False
    ids: NDArray[np.int64] | None = None
    trim: VocabTrim | None = None

    def __init__(self, depth: int, limits: ExpansionLimits | None = None) -> None:
        super().__init__()
        limits = limits or ExpansionLimits()
        self.limits = replace(limits, depth=min(limits.depth, depth))

    @abstractmethod
    def step(self, level: int, tokens: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors at nodes, and logits of the tokens after them.

        Args:
            level: 0 for the root, whose `vectors` are the target's states.
            tokens: int64, shape (n,). The nodes' tokens.
            vectors: (n, d). Their parents' vectors.

        Returns:
            (n, d') and (n, vocabulary).
        """

    def bind(self, model: Any) -> None:
        """Takes the target's device and dtype."""
        self.to(model.get_input_embeddings().weight.device, model.dtype)

    def outputs(self) -> list[nn.Linear]:
        """Output head of each level; see `VocabTrim`."""
        return []

    def state(self) -> _State:
        """A state of no text."""
        return _State()

    def drop(self, state: _State) -> None:
        """Does nothing: the next row replaces all."""

    def read(
        self,
        states: Sequence[_State],
        tokens: Sequence[Tensor],
        hidden: Sequence[Tensor],
        begins: Sequence[int],
    ) -> list[Tensor]:
        """Reads the last row of several texts; see `DraftHead.read`."""
        rows = torch.cat([each[-1:] for each in hidden]).to(next(self.parameters()).dtype)
        vectors, logits = self.step(0, torch.cat([each[-1:] for each in tokens]), rows)
        for state, vector in zip(states, vectors.split(1), strict=True):
            state.nodes, state.vectors = [0], vector
        return list(logits.split(1))

    def expand(self, states: Sequence[_State], growths: Sequence[Growth]) -> list[Tensor]:
        """Logits after the nodes of each frontier; see `DraftHead.expand`."""
        counts = [len(growth.frontier) for growth in growths]
        ids, parents = [], []
        for state, growth in zip(states, growths, strict=True):
            ids += [growth.tokens[node] for node in growth.frontier]
            parents.append(
                state.vectors[[state.nodes.index(growth.parents[node]) for node in growth.frontier]]
            )
        tokens = torch.tensor(ids, dtype=torch.int64, device=parents[0].device)
        level = growths[0].depths[growths[0].frontier[0]]
        vectors, logits = self.step(level, tokens, torch.cat(parents))
        for state, growth, part in zip(states, growths, vectors.split(counts), strict=True):
            state.nodes, state.vectors = list(growth.frontier), part
        return list(logits.split(counts))


class _Residual(nn.Module):
    """Medusa's block: x + silu(linear(x))."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, states: Tensor) -> Tensor:
        return states + nn.functional.silu(self.linear(states))


class MedusaHead(VectorHead):
    """Medusa: head i guesses the token i + 2 positions after a state, for any tokens between.

    Args:
        heads: Number of heads.
        blocks: Residual blocks of each.
        size: Width of the target's states.
        vocabulary: Rows of its output heads.
        limits: Limits on the growth of its trees.
    """

    def __init__(
        self, heads: int, blocks: int, size: int, vocabulary: int, limits: ExpansionLimits | None = None
    ) -> None:
        super().__init__(heads, limits)
        self.heads = nn.ModuleList(
            nn.Sequential(*(_Residual(size) for _ in range(blocks)), nn.Linear(size, vocabulary, bias=False))
            for _ in range(heads)
        )

    def step(self, level: int, tokens: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The target's state, unchanged, and the level's guesses."""
        if self.trim is None:
            return vectors, self.heads[level](vectors)
        *blocks, _ = self.heads[level]
        states = vectors
        for block in blocks:
            states = block(states)
        return vectors, self.trim.logits(states, level)

    def outputs(self) -> list[nn.Linear]:
        """Output head of each level; see `VocabTrim`."""
        return [layers[-1] for layers in self.heads]


class _Scaled(nn.Module):
    """Root mean square norm with scale and shift."""

    def __init__(self, size: int, learned: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32, device="cpu")) if learned else None
        self.bias = nn.Parameter(torch.zeros(size, dtype=torch.float32, device="cpu")) if learned else None

    def forward(self, states: Tensor) -> Tensor:
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)
        return states if self.weight is None or self.bias is None else self.weight * states + self.bias


class MlpSpeculator(VectorHead):
    """IBM's speculator: a state to which each token is added.

    Args:
        depth: Number of levels.
        size: Width of the target's states.
        inner: Width of its own.
        vocabulary: Tokens that it embeds and guesses.
        ties: Whether all levels have the same weights, but for the first projection.
        scales: Whether the target's states are normalised first.
        limits: Limits on the growth of its trees.
    """

    def __init__(
        self,
        depth: int,
        size: int,
        inner: int,
        vocabulary: int,
        ties: bool,
        scales: bool,
        limits: ExpansionLimits | None = None,
    ) -> None:
        super().__init__(depth, limits)
        own = 1 if ties else depth
        self.emb = nn.ModuleList(nn.Embedding(vocabulary, inner) for _ in range(own))
        self.proj = nn.ModuleList(
            nn.Linear(inner if at else size, inner, bias=False)
            for at in range(min(depth, 2) if ties else depth)
        )
        self.head = nn.ModuleList(nn.Linear(inner, vocabulary, bias=False) for _ in range(own))
        self.ln = nn.ModuleList(_Scaled(inner) for _ in range(own))
        self.ln0 = _Scaled(size, learned=False) if scales else None
        state_weight = 0.5 ** (0.5 / depth)
        self._share = math.sqrt((1 - state_weight**2) * (inner / 2)) / state_weight

    def step(self, level: int, tokens: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The state after the nodes' tokens, and the guesses that follow."""
        if level == 0 and self.ln0 is not None:
            vectors = self.ln0(vectors) / math.sqrt(2)
        own, projected = min(level, len(self.emb) - 1), min(level, len(self.proj) - 1)
        states = self.proj[projected](vectors) + self._share * self.emb[own](tokens)
        states = nn.functional.gelu(self.ln[own](states))
        return states, self.head[own](states) if self.trim is None else self.trim.logits(states, own)

    def outputs(self) -> list[nn.Linear]:
        """Output head of each level; see `VocabTrim`."""
        return list(self.head)
