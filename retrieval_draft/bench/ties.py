"""Tokens of a reply compared with the best ones of a teacher-forced pass, in units in the last place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from retrieval_draft.bench.teacher_forcing import reply_logits
from retrieval_draft.engine.sampling.noise import GumbelNoise

__all__ = ["ALLOWED", "TIE", "Ties", "compare", "count_ties", "gaps", "unit"]

TIE = 1e-4
"""Distance of logits that counts as a tie in float32: sums in another order can swap them."""

ALLOWED = 2.0
"""Units that a token may lie below the best one: a tie that another order of sums may decide."""


def unit(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest difference that counts, at each logit: a last place in half precision, else half a `TIE`.

    Args:
        logits: float32, any shape.
        dtype: The one in which the model made them.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return torch.full_like(logits, TIE / ALLOWED)
    exponent = torch.floor(torch.log2(logits.abs().clamp(min=torch.finfo(dtype).tiny)))
    return torch.finfo(dtype).eps * torch.exp2(exponent)


@dataclass(slots=True)
class Ties:
    """Tokens of replies by their distance to the best token at their position.

    Attributes:
        positions: Tokens in all.
        best: The best, or equal to it.
        one: At most one unit below it.
        two: At most two.
        worse: More than two.
        worst: The largest distance, in units.
    """

    positions: int = 0
    best: int = 0
    one: int = 0
    two: int = 0
    worse: int = 0
    worst: float = 0.0

    def add(self, other: Ties) -> None:
        """Adds the counts of `other` to these."""
        for name in ("positions", "best", "one", "two", "worse"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = max(self.worst, other.worst)

    def as_dict(self) -> dict[str, float]:
        """Plain types for JSON."""
        return asdict(self)


def gaps(
    model: Any, prompt: Sequence[int], reply: Sequence[int], noise: GumbelNoise | None = None
) -> list[float]:
    """Distance in units of each token of `reply` to the best one in a pass of `model` over the whole text.

    Args:
        model: A causal language model.
        prompt: Token ids.
        reply: Token ids, at least one.
        noise: Noise that the reply was drawn with, at a temperature of 1 from the whole vocabulary; None for
            greedy.
    """
    logits = reply_logits(model, prompt, reply)
    scores = logits
    if noise is not None:
        drawn = [noise.at(len(prompt) + index) for index in range(len(reply))]
        scores = logits + torch.stack(drawn).to(logits.device)
    chosen = torch.tensor(reply, device=logits.device)[:, None]
    best, at = scores.max(1, keepdim=True)
    dtype = model.get_input_embeddings().weight.dtype
    small = torch.maximum(unit(logits.gather(1, at), dtype), unit(logits.gather(1, chosen), dtype))
    found: list[float] = ((best - scores.gather(1, chosen)) / small)[:, 0].tolist()
    return found


def count_ties(
    model: Any, prompt: Sequence[int], reply: Sequence[int], noise: GumbelNoise | None = None
) -> Ties:
    """Counts the tokens of `reply` by their `gaps`."""
    if not len(reply):
        return Ties()
    found = gaps(model, prompt, reply, noise)
    return Ties(
        positions=len(found),
        best=sum(gap <= 0 for gap in found),
        one=sum(0 < gap <= 1 for gap in found),
        two=sum(1 < gap <= ALLOWED for gap in found),
        worse=sum(not gap <= ALLOWED for gap in found),
        worst=max(found),
    )


def compare(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first index at which two replies differ; None where they are equal."""
    if list(one) == list(other):
        return None
    differing = (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
