"""Drafters for tests, and the comparison that allows for near ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine.draft_engine import DraftEngine
from retrieval_draft.engine.target import Target
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.methods.method import MethodContext
from tests.support.sources import NoCalibration, fuse

NEAR = 1e-4


def drafter_with(model: Any, *sources: Any, target: Target | None = None, **options: Any) -> RetrievalDrafter:
    """A drafter over stand-in sources, fused in their own order."""
    config = DraftConfig(**{"nodes": 8, "prefill_logits": True, **options})
    target = Target(model) if target is None else target
    supply = DraftEngine(target, config, sources, fuse)
    supply._calibration = NoCalibration()
    return RetrievalDrafter(target, None, MethodContext(config, DraftStores(target.embedding_rows)), supply)


def prompt_ids(length: int = 23, vocabulary: int = 97, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (1, length), generator=generator)


def near_ties(model: Any, ours: torch.Tensor, stock: torch.Tensor) -> int:
    """0 if the texts are equal, 1 if they part at a near tie; fails otherwise.

    Args:
        model: The model that made both.
        ours: int64, shape (1, length).
        stock: int64, shape (1, length).
    """
    if torch.equal(ours, stock):
        return 0
    length = min(ours.shape[1], stock.shape[1])
    differs = (ours[0, :length] != stock[0, :length]).nonzero()
    assert len(differs), f"one text goes on where the other ends: {ours.shape} and {stock.shape}"
    at = int(differs[0, 0])
    with torch.no_grad():
        best = model(stock[:, :at]).logits[0, -1].topk(2).values
    gap = float(best[0] - best[1])
    assert gap < NEAR, f"texts part at position {at}, where the best two logits differ by {gap}"
    print(f"near tie at position {at}: {gap}")
    return 1


def reply_of(output: torch.Tensor, prompt: torch.Tensor) -> Sequence[int]:
    return output[0, prompt.shape[1] :].tolist()
