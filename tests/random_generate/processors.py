"""Logits processors and stopping criteria as callers write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

__all__ = ["PROCESSORS", "DividedBy"]


class OfLength(LogitsProcessor):
    """Prefers tokens by the length of the text."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 3.0 * (torch.arange(scores.shape[1]) % 5 == input_ids.shape[1] % 5)


class OfText(LogitsProcessor):
    """Prefers tokens by the last two of the text."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        last = input_ids[:, -2:].sum(1, keepdim=True)
        return scores + 3.0 * ((torch.arange(scores.shape[1])[None] + last) % 3 == 0)


class NotTwice(LogitsProcessor):
    """Bans what it chose the last time, which it remembers as a tensor."""

    def __init__(self) -> None:
        self.best: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.best is not None:
            scores = scores.scatter(1, self.best, -1e9)
        self.best = scores.argmax(1, keepdim=True)
        return scores


class Tiring(LogitsProcessor):
    """Likes every token the less, the more often it was asked; counts in a list that it grows in place."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.asked.append(input_ids.shape[1])
        return scores - 0.2 * len(self.asked) * (torch.arange(scores.shape[1]) % 2)


class InPlace(LogitsProcessor):
    """Changes the scores it is given."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 1] -= 5.0
        return scores


class OfRows:
    """For ``prefix_allowed_tokens_fn``: every row has tokens of its own."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, row: int, text: Tensor) -> list[int]:
        return [token for token in range(self.vocabulary) if (token + row + len(text)) % 3]


PROCESSORS: dict[str, Callable[[int], dict[str, Any]]] = {
    "of-length": lambda vocabulary: {"logits_processor": [OfLength()]},
    "of-text": lambda vocabulary: {"logits_processor": [OfText()]},
    "not-twice": lambda vocabulary: {"logits_processor": [NotTwice()]},
    "tiring": lambda vocabulary: {"logits_processor": [Tiring()]},
    "in-place": lambda vocabulary: {"logits_processor": [InPlace()]},
    "of-rows": lambda vocabulary: {"prefix_allowed_tokens_fn": OfRows(vocabulary)},
    "two": lambda vocabulary: {"logits_processor": [OfText(), Tiring()]},
}
"""New ones by name, as arguments of model.generate."""


class DividedBy(StoppingCriteria):
    """Stops a row whose last token a number divides, for the third time."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        hit = (input_ids[:, -1] % self.number == 0).long()
        self.seen = hit if self.seen is None else self.seen + hit
        return self.seen >= 3
