"""Logits of a model at every position of a given reply, from one pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["reply_logits"]


@torch.no_grad()
def reply_logits(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> Tensor:
    """The logits from which each token of `reply` is chosen.

    Args:
        model: A causal language model.
        prompt: Token ids.
        reply: Token ids, at least one.

    Returns:
        float32, shape (reply, vocabulary).
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt, *reply[:-1]]], device=device)
    # The head over a long prompt and a large vocabulary would take gigabytes.
    keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": len(reply)} if keep else {}
    logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits[0, -len(reply) :]
    return logits.float()
