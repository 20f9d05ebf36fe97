"""Faults put in on purpose, to see that the check notices them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.tree_mask import TreeAttention

__all__ = ["broken"]

_SPARED = 4
"""Trees of so few nodes stay right, so that drafters can be made: they try a tree of four first."""


@contextmanager
def broken(fault: str | None) -> Iterator[None]:
    """Inside, the engine has the named fault: "wrong_mask", "late_copy", or none."""
    if fault is None:
        yield
        return
    patches = {
        "wrong_mask": mock.patch.object(DraftTree, "ancestors", _hidden_root(DraftTree.ancestors)),
        "late_copy": mock.patch.object(TreeAttention, "_send", _late(TreeAttention._send)),
    }
    with patches[fault]:
        yield


def _hidden_root(ancestors: Any) -> Any:
    """One node does not see the root."""

    def faulty(tree: DraftTree) -> NDArray[np.bool_]:
        seen: NDArray[np.bool_] = ancestors(tree)
        if len(tree) > _SPARED:
            seen[1, 0] = False
        return seen

    return faulty


def _late(send: Any) -> Any:
    """The pass does not wait for the copy of its inputs: it finds what the pass before it found.

    On CUDA the copy waits on a stream of its own and nobody waits for that; on a CPU the copy is made
    when the next one is due.
    """
    late: dict[int, Tensor] = {}

    def faulty(attention: TreeAttention, words: int) -> Tensor:
        if words <= 4 * _SPARED:
            arrived: Tensor = send(attention, words)
            return arrived
        host = attention._host[:words]
        if attention.device.type == "cuda":
            side = torch.cuda.Stream(attention.device)
            with torch.cuda.stream(side):
                torch.cuda._sleep(50_000_000)
                attention._up[:words].copy_(host, non_blocking=True)
            return attention._up[:words]
        stale = late.get(id(attention), torch.zeros(0, dtype=host.dtype))
        late[id(attention)] = host.clone()
        seen = host.clone()
        same = min(words, len(stale))
        seen[:same] = stale[:same]
        return seen

    return faulty
