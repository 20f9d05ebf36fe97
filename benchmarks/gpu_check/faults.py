"""Deliberate faults, to test that the check detects them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from retrieval_draft.engine.attention.tree_mask import TreeAttention, TreeInputs, kernels

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
        "wrong_mask": mock.patch.object(kernels, "pack_tree", _hidden_root(kernels.pack_tree)),
        "late_copy": mock.patch.multiple(
            TreeAttention, _send=_late_copy, prepare=_late_here(TreeAttention.prepare)
        ),
    }
    with patches[fault]:
        yield


def _hidden_root(pack: Any) -> Any:
    """Hides the root from one node."""

    def faulty(*given: Any) -> int:
        max_depth: int = pack(*given)
        *_, nodes, _, hidden = given
        if nodes > _SPARED:
            hidden[nodes] = True
        return max_depth

    return faulty


def _late_copy(attention: TreeAttention, words: int) -> Tensor:
    """Copies inputs on a stream of its own, which no pass waits for: it reads those of the pass before."""
    up = attention._up[:words]
    if words <= 4 * _SPARED:
        return up.copy_(attention._host[:words])
    side = torch.cuda.Stream(attention.device)
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        up.copy_(attention._host[:words], non_blocking=True)
    return up


def _late_here(prepare: Any) -> Any:
    """On a CPU, where nothing is copied, gives a pass the tokens of the one before."""
    late: dict[int, Tensor] = {}

    def faulty(attention: TreeAttention, *given: Any) -> TreeInputs:
        inputs: TreeInputs = prepare(attention, *given)
        ids = inputs.input_ids
        if attention.device.type == "cuda" or ids.shape[1] <= _SPARED:
            return inputs
        seen, stale = ids.clone(), late.get(id(attention), ids)
        late[id(attention)] = ids.clone()
        same = min(ids.shape[1], stale.shape[1])
        seen[:, :same] = stale[:, :same]
        return TreeInputs(seen, inputs.position_ids, inputs.attention_mask, inputs.moved)

    return faulty
