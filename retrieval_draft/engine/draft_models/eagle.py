"""EAGLE's heads: a decoder layer over the target's hidden states and the tokens that followed them.

EAGLE and EAGLE-2 (arXiv:2401.15077, arXiv:2406.16858) predict the target's last state and read it with the
target's own output head; EAGLE-3 (arXiv:2503.01840) reads three layers of the target and has an output head
over a vocabulary of its own. At nodes of the tree the head's own states stand for the target's. All trees are
EAGLE-2's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from retrieval_draft.engine.draft_models.draft_layers import (
    DraftLayer,
    KeyedState,
    KeyValues,
    Packed,
    RmsNorm,
    ancestors,
    causal,
    move_head,
)
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, Growth
from retrieval_draft.engine.draft_models.vocab_trim import VocabTrim
from retrieval_draft.engine.hidden_states import LAST

__all__ = ["Eagle3Head", "EagleHead"]


class _State(KeyedState):
    """Keys and values of one text, and the head's states at the nodes that were expanded last.

    Attributes:
        nodes: Those nodes.
        vectors: (nodes, d), the states.
        last: (1, d), the state at the text's end.
    """

    def __init__(self, keys: KeyValues) -> None:
        super().__init__(keys)
        self.nodes: list[int] = []
        self.vectors: Tensor
        self.last: Tensor


class EagleHead(nn.Module):
    """EAGLE, EAGLE-2 and HASS: `fc` joins the embedding of a token with the state before it.

    Args:
        config: That of the head's layers.
        bias: Whether `fc` has one.
        has_embeddings: Whether the checkpoint has embeddings; else the target's are used.
        limits: Limits on the growth of its trees.
    """

    layers: tuple[int, ...] = (LAST,)
    reads_all = True
    levels: int | None = None
    ids: NDArray[np.int64] | None = None
    trim: VocabTrim | None = None

    def __init__(
        self, config: Any, bias: bool, has_embeddings: bool, limits: ExpansionLimits | None = None
    ) -> None:
        super().__init__()
        self.limits = limits or ExpansionLimits()
        self.config = config
        self._make(bias)
        self.embed_tokens: Any = None
        if has_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.rotary = LlamaRotaryEmbedding(config)
        self._target_head: Any = None
        self._target_embeddings: Any = None

    def _make(self, bias: bool) -> None:
        size, count = self.config.hidden_size, self.config.num_hidden_layers
        self.fc = nn.Linear(2 * size, size, bias=bias)
        self.decoder = nn.ModuleList(DraftLayer(self.config, size, has_norm=bool(at)) for at in range(count))

    def bind(self, model: Any) -> None:
        """Takes the target's output head, embeddings, device and dtype."""
        embeddings = model.get_input_embeddings()
        move_head(self, embeddings.weight.device, model.dtype)
        # In a list they are no modules of this one, which would be moved and saved with it.
        self._target_head, self._target_embeddings = [model.get_output_embeddings()], [embeddings]

    def outputs(self) -> list[Any]:
        """Output heads that may be trimmed; see `VocabTrim`."""
        return [self._target_head[0]]

    def state(self) -> _State:
        """A state of no text."""
        return _State(KeyValues(len(self.decoder)))

    def drop(self, state: _State) -> None:
        """Forgets the nodes that were expanded."""
        state.keys.drop()
        state.nodes, state.vectors = [0], state.last

    def read(
        self,
        states: Sequence[_State],
        tokens: Sequence[Tensor],
        hidden: Sequence[Tensor],
        begins: Sequence[int],
    ) -> list[Tensor]:
        """Reads rows of several texts; see `DraftHead.read`."""
        counts = [len(each) for each in tokens]
        device = tokens[0].device
        positions = [
            torch.arange(begin, begin + n, dtype=torch.int64, device=device)
            for begin, n in zip(begins, counts, strict=True)
        ]
        masks = [causal(state.keys, n, device) for state, n in zip(states, counts, strict=True)]
        vectors = self._pass(
            states, torch.cat(list(tokens)), self._taken(torch.cat(list(hidden))), positions, masks, counts
        )
        ends = []
        for state, part, begin in zip(states, vectors.split(counts), begins, strict=True):
            state.keys.length += len(part)
            state.keys.position = begin + len(part)
            state.last = part[-1:]
            state.nodes, state.vectors = [0], state.last
            ends.append(state.last)
        return list(self._logits(torch.cat(ends)).split(1))

    def expand(self, states: Sequence[_State], growths: Sequence[Growth]) -> list[Tensor]:
        """Logits after the nodes of each frontier; see `DraftHead.expand`."""
        counts = [len(growth.frontier) for growth in growths]
        device = states[0].vectors.device
        tokens, vectors, positions, masks = [], [], [], []
        for state, growth in zip(states, growths, strict=True):
            tokens += [growth.tokens[node] for node in growth.frontier]
            vectors.append(
                state.vectors[[state.nodes.index(growth.parents[node]) for node in growth.frontier]]
            )
            depths = torch.tensor(
                [growth.depths[node] for node in growth.frontier], dtype=torch.int64, device=device
            )
            positions.append(depths + state.keys.position - 1)
            masks.append(ancestors(state.keys, growth, device))
        ids = torch.tensor(tokens, dtype=torch.int64, device=device)
        passed = self._pass(states, ids, torch.cat(vectors), positions, masks, counts)
        for state, growth, part in zip(states, growths, passed.split(counts), strict=True):
            state.keys.staged += len(part)
            state.nodes, state.vectors = list(growth.frontier), part
        return list(self._logits(passed).split(counts))

    def forward(self, tokens: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """The head's states at rows of whole texts, for training: nothing is kept, gradients pass.

        Args:
            tokens: int64, shape (n,) each. The rows' tokens.
            vectors: (n, d) each. The states before them: the target's, or the head's own.

        Returns:
            (n, d) each.
        """
        counts = [len(each) for each in tokens]
        device = tokens[0].device
        states = [self.state() for _ in tokens]
        masks = [causal(state.keys, n, device) for state, n in zip(states, counts, strict=True)]
        positions = [torch.arange(n, device=device) for n in counts]
        taken = self._taken(torch.cat(list(vectors)))
        return list(
            self._pass(states, torch.cat(list(tokens)), taken, positions, masks, counts).split(counts)
        )

    def _taken(self, hidden: Tensor) -> Tensor:
        """The target's states as the head takes them in: (n, d)."""
        return hidden.to(self.fc.weight.dtype)

    def _embedded(self, tokens: Tensor) -> Tensor:
        embeddings = self._target_embeddings[0] if self.embed_tokens is None else self.embed_tokens
        out: Tensor = embeddings(tokens)
        return out

    def _pass(
        self,
        states: Sequence[_State],
        tokens: Tensor,
        vectors: Tensor,
        positions: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        counts: Sequence[int],
    ) -> Tensor:
        """The head's states, (n, d), at rows of several texts: tokens and the states before them."""
        indices = torch.cat(list(positions)).to(tokens.device)
        cos, sin = self.rotary(vectors, indices[None])
        packed = Packed([state.keys for state in states], masks, counts, (cos[0], sin[0]))
        return self._layers(self._embedded(tokens), vectors, packed)

    def _layers(self, embedded: Tensor, vectors: Tensor, packed: Packed) -> Tensor:
        states: Tensor = self.fc(torch.cat((embedded, vectors), -1))
        layers: Any = self.decoder
        for at, layer in enumerate(layers):
            states = layer(states, layer.input_layernorm(states), at, packed)
        return states

    def _logits(self, vectors: Tensor) -> Tensor:
        head = self._target_head[0]
        vectors = vectors.to(head.weight.dtype)
        out: Tensor = head(vectors) if self.trim is None else self.trim.logits(vectors)
        return out


class Eagle3Head(EagleHead):
    """EAGLE-3: `fc` joins three layers' states, the first layer reads them beside the token's embedding.

    Args:
        config: That of the head's layers.
        layers: Layers of the target whose states it reads.
        target_size: Width of the target's states.
        columns: Tokens of its own vocabulary.
        has_embeddings: Whether the checkpoint has embeddings; else the target's are used.
        norm_first: Whether the residual begins with the normalised states.
        has_input_norm: Whether the joined states are normalised before `fc`.
        limits: Limits on the growth of its trees.
    """

    def __init__(
        self,
        config: Any,
        layers: Sequence[int],
        target_size: int,
        columns: int,
        has_embeddings: bool,
        norm_first: bool = False,
        has_input_norm: bool = False,
        limits: ExpansionLimits | None = None,
    ) -> None:
        self._shape = (target_size * len(layers), columns, has_input_norm)
        super().__init__(config, False, has_embeddings, limits)
        self.layers = tuple(layers)
        self._norm_first = norm_first

    def _make(self, bias: bool) -> None:
        taken, columns, has_input_norm = self._shape
        config = self.config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = RmsNorm(taken, eps) if has_input_norm else nn.Identity()
        self.fc = nn.Linear(taken, size, bias=bias)
        self.decoder = nn.ModuleList(
            DraftLayer(config, size if at else 2 * size) for at in range(config.num_hidden_layers)
        )
        self.decoder[0].hidden_norm = RmsNorm(size, eps)
        self.norm = RmsNorm(size, eps)
        self.lm_head = nn.Linear(size, columns, bias=False)

    def outputs(self) -> list[Any]:
        """None: its vocabulary is its own."""
        return []

    def _taken(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.fc(self.input_norm(super()._taken(hidden)))
        return out

    def _layers(self, embedded: Tensor, vectors: Tensor, packed: Packed) -> Tensor:
        first: Any = self.decoder[0]
        normed = first.hidden_norm(vectors)
        taken = torch.cat((first.input_layernorm(embedded), normed), -1)
        states = normed if self._norm_first else vectors
        layers: Any = self.decoder
        for at, layer in enumerate(layers):
            taken = layer.input_layernorm(states) if at else taken
            states = layer(states, taken, at, packed)
        return states

    def _logits(self, vectors: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.norm(vectors))
        return out
