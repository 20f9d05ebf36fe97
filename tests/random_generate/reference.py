"""model.generate, sampling with the noise that a drafter's seed stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from retrieval_draft.engine.sampling.noise import GumbelNoise

__all__ = ["keyed_draws"]


@contextmanager
def keyed_draws(rows: Sequence[Sequence[int]], seeds: Sequence[int], vocabulary: int) -> Iterator[None]:
    """Has torch draw one token a row and step by Gumbel's trick, from noise keyed as the drafter's is.

    The distribution is that of model.generate; only the dice are others.

    Args:
        rows: The prompts without padding, each as often as it is sampled.
        seeds: One for each row.
        vocabulary: Token ids.
    """
    samples: Counter[tuple[int, tuple[int, ...]]] = Counter()
    noises = []
    for row, seed in zip(rows, seeds, strict=True):
        key = seed, tuple(row)
        noises.append(GumbelNoise(seed, vocabulary, torch.device("cpu"), sample=samples[key]))
        samples[key] += 1
    steps = iter(range(1 << 30))

    def draw(probs: Tensor, num_samples: int) -> Tensor:
        if not bool(torch.isfinite(probs).all()):
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        step = next(steps)
        noise = torch.stack([noise.at(len(row) + step) for noise, row in zip(noises, rows, strict=True)])
        return (probs.log() + noise).argmax(1, keepdim=True)

    with mock.patch("torch.multinomial", draw):
        yield
