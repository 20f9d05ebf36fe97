"""Logits processors of OpenAI's API: presence and frequency penalties, and allowed tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

__all__ = ["AllowedTokens", "CountPenalty"]


class CountPenalty(LogitsProcessor):
    """Lowers the logits of tokens that the reply holds already; the prompt does not count.

    Args:
        prompt_length: Tokens before the reply.
        presence: Subtracted from each token that occurs.
        frequency: Subtracted for each of its occurrences.

    Example:
        presence 1, frequency 0.5, reply [7, 7]  ->  token 7 loses 2
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self._begin, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token, float, shape (rows, vocabulary)."""
        reply = input_ids[:, self._begin :].to(scores.device)
        if not reply.shape[1]:
            return scores
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, reply, torch.ones_like(reply, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0).to(scores.dtype)


class AllowedTokens(LogitsProcessor):
    """Masks all tokens but the allowed ones.

    Args:
        tokens: The allowed tokens.
        vocabulary: Number of token ids.
    """

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self._refused = torch.ones(vocabulary, dtype=torch.bool)
        self._refused[list(tokens)] = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token, float, shape (rows, vocabulary)."""
        refused = self._refused.to(scores.device)[: scores.shape[-1]]
        return scores.masked_fill(refused, float("-inf"))
