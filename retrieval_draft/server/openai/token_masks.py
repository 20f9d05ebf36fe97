"""Logits processors of OpenAI's API: allowed tokens, texts that a reply does not have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

__all__ = ["AllowedTokens", "BadWords"]


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


class BadWords(LogitsProcessor):
    """Masks the last token of sequences that a reply does not have; the prompt does not count.

    Args:
        prompt_length: Tokens before the reply.
        words: Token ids of each.

    Example:
        words [[5], [6, 7]], reply [6]  ->  5 and 7 are masked
    """

    def __init__(self, prompt_length: int, words: Sequence[Sequence[int]]) -> None:
        self._begin, self._words = prompt_length, [list(word) for word in words]
        self._longest = max(map(len, self._words), default=0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token, float, shape (rows, vocabulary)."""
        refused = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        begin = max(self._begin, input_ids.shape[1] - self._longest)
        for row, reply in enumerate(input_ids[:, begin:].tolist()):
            for *before, last in self._words:
                if len(before) <= len(reply) and reply[len(reply) - len(before) :] == before:
                    refused[row, last] = True
        return scores.masked_fill(refused, float("-inf"))
