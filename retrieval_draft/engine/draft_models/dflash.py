"""DFlash: a block of tokens guessed in one pass, by layers that see the target's states and masks.

Chen et al. (2026, arXiv:2602.06036): each layer attends to keys that it makes of the target's states of the
text so far, and, in both directions, to a block: the last token and a mask for each position after it. A
position's guess does not depend on the tokens before it in the block.
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
    move_head,
)
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, Growth
from retrieval_draft.errors import InvalidInputError

__all__ = ["DFlashHead"]


class _State(KeyedState):
    """Keys and values of one text's states, and the guesses for the positions after it.

    Attributes:
        guesses: (levels, columns). Logits of each position of the block but the first.
    """

    def __init__(self, keys: KeyValues) -> None:
        super().__init__(keys)
        self.guesses: Tensor


class DFlashHead(nn.Module):
    """DFlash's draft model, as a `DraftHead`.

    Args:
        config: That of its layers, of Qwen 3.
        layers: Layers of the target whose states it reads.
        block: Tokens of a block, the last one of the text included.
        mask: Id of the token in place of those to be guessed.
        limits: Limits on the growth of its trees.
        columns: Tokens of an output head of its own; None where that is the target's.
    """

    reads_all = True
    ids: NDArray[np.int64] | None = None

    def __init__(
        self,
        config: Any,
        layers: Sequence[int],
        block: int,
        mask: int,
        limits: ExpansionLimits | None = None,
        columns: int | None = None,
    ) -> None:
        super().__init__()
        if block < 2:
            raise ValueError(f"block_size is {block}; expected is 2 or more")
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self.layers = tuple(layers)
        self.levels: int | None = block - 1
        self.limits = limits or ExpansionLimits(depth=block - 1)
        self._block, self._mask = block, mask
        size, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(len(layers) * size, size, bias=False)
        self.hidden_norm, self.norm = RmsNorm(size, eps), RmsNorm(size, eps)
        self.decoder = nn.ModuleList(DraftLayer(config, size) for _ in range(config.num_hidden_layers))
        self.rotary = LlamaRotaryEmbedding(config)
        self.lm_head = None if columns is None else nn.Linear(size, columns, bias=False)
        self._target_head: Any = None
        self._target_embeddings: Any = None

    def bind(self, model: Any) -> None:
        """Takes the target's output head, embeddings, device and dtype."""
        embeddings = model.get_input_embeddings()
        if not 0 <= self._mask < embeddings.weight.shape[0]:
            raise InvalidInputError(
                f"The head's mask is token {self._mask}; the model has {embeddings.weight.shape[0]}.",
                "Use a head that was trained for this model.",
            )
        move_head(self, embeddings.weight.device, model.dtype)
        # In a list they are no modules of this one, which would be moved and saved with it.
        self._target_head, self._target_embeddings = [model.get_output_embeddings()], [embeddings]

    def state(self) -> _State:
        """A state of no text."""
        return _State(KeyValues(len(self.decoder)))

    def drop(self, state: _State) -> None:
        """Does nothing: the keys of a block are overwritten by the next."""

    def read(
        self,
        states: Sequence[_State],
        tokens: Sequence[Tensor],
        hidden: Sequence[Tensor],
        begins: Sequence[int],
    ) -> list[Tensor]:
        """Reads rows of several texts, and guesses the block after each; see `DraftHead.read`."""
        counts = [len(each) for each in tokens]
        context = self.hidden_norm(self.fc(torch.cat(list(hidden)).to(self.fc.weight.dtype)))
        caches = [state.keys for state in states]
        packed = self._packed(caches, begins, counts, context)
        layers: Any = self.decoder
        for at, layer in enumerate(layers):
            layer.self_attn.append(context, at, packed)
        for cache, begin, count in zip(caches, begins, counts, strict=True):
            cache.length += count
            cache.position = begin + count
        ids = tokens[0].new_full((len(states), self._block), self._mask)
        ids[:, 0] = torch.stack([each[-1] for each in tokens])
        rows = self._target_embeddings[0](ids).flatten(0, 1).to(context.dtype)
        packed = self._packed(caches, [cache.position for cache in caches], [self._block] * len(caches), rows)
        for at, layer in enumerate(layers):
            rows = layer(rows, layer.input_layernorm(rows), at, packed)
        head = self._target_head[0] if self.lm_head is None else self.lm_head
        logits = head(self.norm(rows).view(len(states), self._block, -1)[:, 1:].to(head.weight.dtype))
        for state, guesses in zip(states, logits, strict=True):
            state.guesses = guesses
        return [state.guesses[:1] for state in states]

    def expand(self, states: Sequence[_State], growths: Sequence[Growth]) -> list[Tensor]:
        """The guesses for the positions after the nodes of each frontier; see `DraftHead.expand`."""
        return [
            state.guesses[growth.depths[growth.frontier[0]]].expand(len(growth.frontier), -1)
            for state, growth in zip(states, growths, strict=True)
        ]

    def _packed(
        self, caches: Sequence[KeyValues], begins: Sequence[int], counts: Sequence[int], rows: Tensor
    ) -> Packed:
        """Rows of several texts at the positions from `begins` on, which see all keys of their text."""
        positions = torch.cat(
            [
                torch.arange(begin, begin + count, dtype=torch.int64, device=rows.device)
                for begin, count in zip(begins, counts, strict=True)
            ]
        )
        cos, sin = self.rotary(rows, positions[None])
        return Packed(caches, [None] * len(caches), counts, (cos[0], sin[0]))
