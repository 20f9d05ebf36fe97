"""Tapes: what a replay computes anew, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retrieval_draft.engine.graph.captured import TapeGraph, UncapturableError


def test_a_replay_reads_what_the_tensors_hold_now() -> None:
    given, memory = torch.arange(4.0), torch.zeros(6)

    def calls() -> Tensor:
        memory.index_copy_(0, torch.arange(2) + given[:1].long(), given[2:])
        return memory.view(2, 3).sum(0) * 2

    tape = TapeGraph()
    out = tape.capture(calls)
    assert out.tolist() == [4.0, 6.0, 0.0]
    given.copy_(torch.tensor([3.0, 0.0, 5.0, 7.0]))
    tape.replay()
    assert out.tolist() == [14.0, 20.0, 0.0]
    assert memory.tolist() == [2.0, 3.0, 0.0, 5.0, 7.0, 0.0]
    assert len(tape) > 4


def test_numbers_that_the_host_chose_are_frozen() -> None:
    given, number = torch.ones(2), [3]
    tape = TapeGraph()
    out = tape.capture(lambda: given * number[0])
    number[0] = 100
    tape.replay()
    assert out.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "calls",
    [
        lambda x: x * x.max().item(),
        lambda x: x if x.any() else -x,
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: torch.ones(int(x.sum())),
        lambda x: x.new_tensor(x.tolist()),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.index_put((x > 1,), x[:2]),
        lambda x: x.unique(),
    ],
)
def test_calls_that_let_the_host_wait_are_refused(calls: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UncapturableError):
        TapeGraph().capture(lambda: calls(torch.arange(4.0)))


def test_masks_of_fixed_shape_are_not_refused() -> None:
    given = torch.arange(4.0)

    def calls() -> Tensor:
        out = given.masked_fill(given > 1, 0.0)
        out[out == 1] = 9.0
        return torch.where(given > 2, given, out)

    tape = TapeGraph()
    out = tape.capture(calls)
    given.copy_(torch.tensor([1.0, 2.0, 3.0, 0.0]))
    tape.replay()
    assert out.tolist() == [9.0, 0.0, 3.0, 0.0]
