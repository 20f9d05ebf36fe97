"""Heads that carry one vector along a path, and read no row of a text but its last one.

Medusa (arXiv:2401.10774) guesses each further token from the target's last state alone, Hydra
(arXiv:2402.05109) from that and the tokens between; IBM's speculator (arXiv:2404.19124) from a state to which
each token is added, and Apple's ReDrafter (arXiv:2403.09919) from a recurrent state beside the target's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrieval_draft.engine.draft_models.draft_layers import move_head
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, Growth
from retrieval_draft.engine.draft_models.vocab_trim import VocabTrim
from retrieval_draft.engine.hidden_states import LAST

__all__ = ["HydraHead", "MedusaHead", "MlpSpeculator", "PathHead", "PathState", "ReDrafter", "VectorHead"]


class PathState:
    """The vectors of one text.

    Attributes:
        nodes: Nodes that were expanded last.
        vectors: (nodes, d), theirs.
        last: (1, d), that at the text's end.
        cache: The target's keys and values of the text but for its last token, lent to heads that read them.
    """

    length = 0
    nbytes = 0
    cache: Any = None

    def __init__(self) -> None:
        self.nodes: list[int] = []
        self.vectors: Tensor
        self.last: Tensor

    def copy(self, rows: int) -> PathState:
        """An empty one: a text is not read on from its middle."""
        return PathState()


class PathHead(nn.Module, ABC):
    """A head that carries one vector along a path.

    Args:
        depth: Number of levels that it has weights for; None for any number.
        limits: Limits on the growth of its trees.
    """

    layers: tuple[int, ...] = (LAST,)
    reads_all = False
    ids: NDArray[np.int64] | None = None
    trim: VocabTrim | None = None

    def __init__(self, depth: int | None, limits: ExpansionLimits | None = None) -> None:
        super().__init__()
        self.levels = depth
        self._target_embeddings: Any = None
        self.limits = limits or ExpansionLimits()

    @abstractmethod
    def steps(
        self, states: Sequence[PathState], counts: Sequence[int], level: int, tokens: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Vectors at nodes of several texts, and logits of the tokens after them.

        Args:
            states: One for each text.
            counts: Nodes of each text.
            level: 0 for the roots, whose `vectors` are the target's states.
            tokens: int64, shape (n,). The nodes' tokens, one text's after the other's.
            vectors: (n, d). Their parents' vectors.

        Returns:
            (n, d') and (n, vocabulary).
        """

    def bind(self, model: Any) -> None:
        """Takes the target's embeddings, device and dtype."""
        embeddings = model.get_input_embeddings()
        move_head(self, embeddings.weight.device, model.dtype)
        self._target_embeddings = [embeddings]  # in a list it is no module of this one

    def outputs(self) -> list[nn.Module]:
        """Output heads with a row for each token, for `guesses`; none where they are not trimmed."""
        return []

    def guesses(self, states: Tensor, head: int = 0) -> Tensor:
        """Logits by one of its output heads, of all tokens or of those of `trim`, from states (n, d)."""
        out: Tensor = self.outputs()[head](states) if self.trim is None else self.trim.logits(states, head)
        return out

    def state(self) -> PathState:
        """A state of no text."""
        return PathState()

    def drop(self, state: PathState) -> None:
        """Forgets the nodes that were expanded."""
        state.nodes, state.vectors = [0], state.last

    def read(
        self,
        states: Sequence[PathState],
        tokens: Sequence[Tensor],
        hidden: Sequence[Tensor],
        begins: Sequence[int],
    ) -> list[Tensor]:
        """Reads the last row of several texts; see `DraftHead.read`."""
        rows = torch.cat([each[-1:] for each in hidden]).to(next(self.parameters()).dtype)
        roots = torch.cat([each[-1:] for each in tokens])
        vectors, logits = self.steps(states, [1] * len(states), 0, roots, rows)
        for state, vector in zip(states, vectors.split(1), strict=True):
            state.last = vector
            state.nodes, state.vectors = [0], vector
        return list(logits.split(1))

    def expand(self, states: Sequence[PathState], growths: Sequence[Growth]) -> list[Tensor]:
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
        vectors, logits = self.steps(states, counts, level, tokens, torch.cat(parents))
        for state, growth, part in zip(states, growths, vectors.split(counts), strict=True):
            state.nodes, state.vectors = list(growth.frontier), part
        return list(logits.split(counts))


class VectorHead(PathHead):
    """A head that makes each node's vector of its token and its parent's vector alone.

    Args:
        depth, limits: As for `PathHead`.
    """

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

    def steps(
        self, states: Sequence[PathState], counts: Sequence[int], level: int, tokens: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `step`; the texts' nodes together."""
        return self.step(level, tokens, vectors)


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
        layers: Any = self.heads[level]
        states = layers[:-1](vectors)
        return vectors, self.guesses(states, level)

    def outputs(self) -> list[nn.Module]:
        """Output head of each level."""
        heads: Any = self.heads
        return [layers[-1] for layers in heads]


class _Joined(nn.Module):
    """Hydra's first block, which narrows what it joins: linear(x) + silu(linear(x))."""

    def __init__(self, joined: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(joined, size)
        self.res_connection = nn.Linear(joined, size)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = self.res_connection(states) + nn.functional.silu(self.linear(states))
        return out


class HydraHead(VectorHead):
    """Hydra: head i guesses the token i + 2 positions after a state, from it and the tokens between.

    Args:
        heads: Number of heads.
        blocks: Residual blocks of each.
        size: Width of the target's states and embeddings.
        vocabulary: Rows of its output heads.
        is_grounded: Whether heads see the tokens between; else they are Medusa's with a bias.
        limits: Limits on the growth of its trees.
    """

    def __init__(
        self,
        heads: int,
        blocks: int,
        size: int,
        vocabulary: int,
        is_grounded: bool = True,
        limits: ExpansionLimits | None = None,
    ) -> None:
        super().__init__(heads, limits)
        self._is_grounded = is_grounded
        self.hydra_mlp = nn.ModuleList(
            nn.Sequential(
                *(
                    _Joined(size * (at + 2), size) if is_grounded and block == 0 else _Residual(size)
                    for block in range(blocks)
                )
            )
            for at in range(heads)
        )
        self.hydra_lm_head = nn.ModuleList(nn.Linear(size, vocabulary) for _ in range(heads))

    def step(self, level: int, tokens: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The target's state and the embeddings along the path, and the level's guesses."""
        if self._is_grounded:
            embedded = self._target_embeddings[0](tokens).to(vectors.dtype)
            vectors = torch.cat((vectors, embedded), -1)
        return vectors, self.guesses(self.hydra_mlp[level](vectors), level)

    def outputs(self) -> list[nn.Module]:
        """Output head of each level."""
        return list(self.hydra_lm_head)


class ReDrafter(VectorHead):
    """Apple's recurrent drafter: a state that each token is added to, beside the target's, which stays.

    Args:
        size: Width of the target's states and embeddings.
        inner: Width of its blocks.
        blocks: Residual blocks.
        vocabulary: Tokens that it guesses.
        is_recurrent: Whether the state passes through weights; else embeddings are summed.
        limits: Limits on the growth of its trees; published beams have four tokens.
    """

    def __init__(
        self,
        size: int,
        inner: int,
        blocks: int,
        vocabulary: int,
        is_recurrent: bool,
        limits: ExpansionLimits | None = None,
    ) -> None:
        super().__init__(None, limits or ExpansionLimits(depth=4))
        self._size = size
        self.input_proj = nn.Linear(2 * size, inner) if inner != 2 * size else nn.Identity()
        self.lm_head = nn.Sequential(
            *(_Residual(inner) for _ in range(blocks)), nn.Linear(inner, vocabulary, bias=False)
        )
        self.rnn_u = nn.Linear(size, size) if is_recurrent else None
        self.rnn_w = nn.Linear(size, size, bias=False) if is_recurrent else None

    def step(self, level: int, tokens: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The target's state with the recurrent one after the nodes' tokens, and the guesses that follow."""
        context, state = vectors[:, : self._size], vectors[:, self._size :]
        if level == 0:
            state = torch.zeros_like(context)
        embedded = self._target_embeddings[0](tokens).to(vectors.dtype)
        if self.rnn_u is None or self.rnn_w is None:
            state = embedded + state
        else:
            state = nn.functional.silu(self.rnn_w(embedded) + self.rnn_u(state))
        joined = torch.cat((context, state), -1)
        return joined, self.guesses(self.lm_head[:-1](self.input_proj(joined)))

    def outputs(self) -> list[nn.Module]:
        """The one output head."""
        return [self.lm_head[-1]]


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
        return states, self.guesses(states, own)

    def outputs(self) -> list[nn.Module]:
        """Output head of each level."""
        return list(self.head)
