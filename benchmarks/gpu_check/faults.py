"""Deliberate faults, to test that the check detects them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from retrieval_draft.engine.attention.tree_mask import TreeAttention, TreeInputs

__all__ = ["broken"]

_SPARED = 4
"""Number of nodes up to which trees stay correct, so that drafters can be made: they try a tree of four
first."""


@contextmanager
def broken(fault: str | None) -> Iterator[None]:
    """Gives the engine the named fault inside the context: "wrong_mask", "late_copy", or none."""
    if fault is None:
        yield
        return
    patches = {
        "wrong_mask": mock.patch.object(TreeAttention, "unpack", _hidden_root(TreeAttention.unpack)),
        "late_copy": mock.patch.object(TreeAttention, "_send", _late(TreeAttention._send)),
    }
    with patches[fault]:
        yield


def _hidden_root(unpack: Any) -> Any:
    """Hides the root from one node."""

    def faulty(attention: TreeAttention, up: Tensor, nodes: int, extra: int, *rest: int) -> TreeInputs:
        if nodes > _SPARED:
            up[3 * nodes + extra :].view(torch.bool)[nodes] = True
        inputs: TreeInputs = unpack(attention, up, nodes, extra, *rest)
        return inputs

    return faulty


def _late(send: Any) -> Any:
    """Makes a pass not wait for the copy of its inputs: it reads those of the pass before.

    On CUDA the copy waits on a stream of its own, which no pass waits for; on a CPU the copy is made
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
