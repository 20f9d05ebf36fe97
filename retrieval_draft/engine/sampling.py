"""The target's choice after one node when logits processors or sampling take part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retrieval_draft.engine.noise import GumbelNoise
from retrieval_draft.errors import NonFiniteLogitsError

__all__ = ["Sampler", "non_finite"]


def non_finite(position: int) -> NonFiniteLogitsError:
    """The error for NaN in the logits after the token at `position`."""
    return NonFiniteLogitsError(
        f"The model returned NaN in the logits for position {position}, so there is no next token to choose.",
        "Load the model in bfloat16 or float32 instead of float16, and check its weights for NaN.",
    )


class Sampler:
    """Chooses tokens as plain decoding does: processors on the node's own prefix, then one draw.

    Args:
        processors: LogitsProcessorList with their state, called once for each accepted token.
        noise: Gumbel noise for sampling, or None for greedy.
        keep_scores: Whether to keep processed scores in `scores`.
        keep_logits: Whether to keep raw logits in `logits`.
    """

    def __init__(
        self,
        processors: Any,
        noise: GumbelNoise | None,
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self._processors = processors
        self._noise = noise
        self.scores: list[Tensor] | None = [] if keep_scores else None
        self.logits: list[Tensor] | None = [] if keep_logits else None

    def choose(self, row: Tensor, ids: Tensor, position: int) -> int:
        """The next token after the prefix `ids`.

        Args:
            row: (vocabulary,). The node's logits; left as they are.
            ids: int64, shape (1, length). The node's prefix, its own token last, padding included.
            position: Of the token to be chosen, padding not counted.
        """
        # Processors write into their input; a copy of one row is what plain decoding makes too.
        raw = row[None].to(dtype=torch.float32, copy=True)
        scores = self._processors(ids.to(raw.device), raw if self.logits is None else raw.clone())
        if self.scores is not None:
            self.scores.append(scores.to(ids.device))
        if self.logits is not None:
            self.logits.append(raw.to(ids.device))
        keyed = scores if self._noise is None else scores + self._noise.at(position)
        best = keyed.argmax(-1)
        token, lost = torch.stack([best[0], keyed.gather(-1, best[:, None]).isnan()[0, 0].long()]).tolist()
        if lost:
            raise non_finite(position)
        return int(token)
