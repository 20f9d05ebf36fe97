"""Processors that lower the logits of tokens by their occurrence in the text, in a captured pass too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

__all__ = ["CountPenalty", "Penalties", "penalised", "penalties_of"]


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
        self.begin, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token, float, shape (rows, vocabulary)."""
        reply = input_ids[:, self.begin :].to(scores.device)
        if not reply.shape[1]:
            return scores
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, reply, torch.ones_like(reply, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0).to(scores.dtype)


@dataclass(frozen=True, slots=True)
class Penalties:
    """The numbers by which a list of processors lowers the logits of tokens that occur.

    Attributes:
        repetition: Divides positive logits, and multiplies others, of tokens from `seen_from` on.
        seen_from: Index in the text, padding included.
        presence, frequency: As of `CountPenalty`, for tokens from `counted_from` on.
        counted_from: Index in the text, padding included.
    """

    repetition: float = 1.0
    seen_from: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    counted_from: int = 0


def penalties_of(processors: Sequence[Any]) -> Penalties | None:
    """The penalties that processors amount to; None where they do something else, or in another order."""
    repetition, seen_from, counted = 1.0, 0, CountPenalty(0, 0.0, 0.0)
    rest = list(processors)
    if rest and type(rest[0]) is RepetitionPenaltyLogitsProcessor:
        first = rest.pop(0)
        ignored = getattr(first, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor) and ignored.device.type == "cpu" and len(ignored) == 1:
            ignored = int(ignored)
        if not isinstance(ignored, int | None):
            return None
        repetition, seen_from = first.penalty, ignored or 0
    if rest and type(rest[0]) is CountPenalty:
        counted = rest.pop(0)
    if rest:
        return None
    return Penalties(repetition, seen_from, counted.presence, counted.frequency, counted.begin)


def penalised(
    logits: Tensor, seen: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Scores as the processors make them of float32 logits on a CPU, with the same bits.

    Args:
        logits: (rows, n, vocabulary), any floating dtype.
        seen: bool, of the same shape. Whether the token occurs for the repetition penalty.
        counts: Integers, of the same shape. Occurrences for the two other penalties.
        repetition: As of `Penalties`: float32, shape (rows, 1, 1).
        presence: The same of the next.
        frequency: The same of the last.

    Returns:
        float32, shape (rows, n, vocabulary).
    """
    scores = logits.float()
    scores = torch.where(seen, torch.where(scores < 0, scores * repetition, scores / repetition), scores)
    return scores - frequency * counts - presence * (counts > 0)
