"""Log probabilities of a prompt's own tokens, for echo."""

from __future__ import annotations

from torch import Tensor

from retrieval_draft.engine.sampling.token_logprobs import TokenLogprobs, token_logprobs
from retrieval_draft.index.source import TokenArray

__all__ = ["PromptLogprobs"]


class PromptLogprobs:
    """Reads the model's logits after each token of a prompt, on the engine's thread.

    Args:
        prompt: int32, shape (length,).
        k: Alternatives of each token.

    Attributes:
        logprobs: Log probabilities from the second token on; the first has none.
    """

    def __init__(self, prompt: TokenArray, k: int) -> None:
        self._next = [int(token) for token in prompt[1:]]
        self._k = k
        self.logprobs: list[TokenLogprobs] = []

    def __call__(self, logits: Tensor) -> None:
        """Reads the logits of the next positions: (m, vocabulary)."""
        for row in logits:
            index = len(self.logprobs)
            if index < len(self._next):
                self.logprobs.append(token_logprobs(row, self._next[index], self._k))
