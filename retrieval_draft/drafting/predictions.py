"""Predictions of the target model at verified nodes, on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Predictions"]


@dataclass(frozen=True, slots=True)
class Predictions:
    """The head's output at n nodes, on the host.

    Attributes:
        next_tokens: int32, shape (n,). The most probable next token, the lowest id among equals.
        finite: bool, shape (n,). False where a logit is NaN.
        top_tokens: int32, shape (n, k). Most probable tokens, best first.
        top_probs: float32, shape (n, k). Their probabilities.
    """

    next_tokens: NDArray[np.int32]
    finite: NDArray[np.bool_]
    top_tokens: NDArray[np.int32]
    top_probs: NDArray[np.float32]
