"""Log probabilities of a chosen token and of the most probable ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenLogprobs", "token_logprobs"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one position, under the model's own logits.

    Attributes:
        token: The token at that position.
        logprob: Its own.
        top: The most probable tokens, best first.
        top_logprobs: Theirs.
    """

    token: int
    logprob: float
    top: list[int]
    top_logprobs: list[float]


def token_logprobs(logits: Tensor, token: int, k: int) -> TokenLogprobs:
    """Reads one row of logits.

    Args:
        logits: (vocabulary,), any floating dtype, before processors and temperature.
        token: The chosen token.
        k: Number of most probable tokens to return.

    Example:
        logits log([0.5, 0.25, 0.25]), token 1, k 1  ->  -1.39, and the best, token 0, with -0.69
    """
    row = logits.float()
    total = torch.logsumexp(row, -1)
    best, where = torch.topk(row, min(k, len(row)))
    values = (torch.cat([row[token : token + 1], best]) - total).tolist()
    return TokenLogprobs(token, values[0], where.tolist(), values[1:])
