"""Near ties in units in the last place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrieval_draft.bench.agreement import compare_outputs
from retrieval_draft.bench.ties import TIE, Ties, compare, count_ties, gaps, unit
from retrieval_draft.engine.sampling.noise import GumbelNoise

HALF = torch.bfloat16


class Says(torch.nn.Module):
    """A model whose logits are the same at every position."""

    def __init__(self, logits: list[float], dtype: torch.dtype) -> None:
        super().__init__()
        self.logits = torch.tensor(logits, dtype=dtype)
        self.embedding = torch.nn.Embedding(len(logits), 1, dtype=dtype)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        return SimpleNamespace(logits=self.logits.expand(1, input_ids.shape[1], -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.75, 1.0, 3.0, -5.5, 100.0, 4096.0])
def test_unit_is_the_distance_to_the_next_number(dtype: torch.dtype, value: float) -> None:
    low = torch.tensor(abs(value), dtype=dtype)
    after = torch.nextafter(low, torch.tensor(float("inf"), dtype=dtype))
    assert float(unit(torch.tensor([value]), dtype)) == float(after.float() - low.float())


def test_unit_of_float32_is_a_fixed_tie() -> None:
    assert unit(torch.tensor([1.0, 500.0]), torch.float32).tolist() == pytest.approx([TIE / 2] * 2)


def test_tokens_are_counted_by_their_distance_to_the_best() -> None:
    last = 2.0**-7  # of numbers from 1 to 2 in bfloat16
    model = Says([1.5, 1.5 - last, 1.5 - 2 * last, 1.5 - 3 * last, 1.5], HALF)
    assert gaps(model, [0], [0, 1, 2, 3, 4]) == [0, 1, 2, 3, 0]
    ties = count_ties(model, [0], [0, 1, 2, 3, 4])
    assert ties == Ties(positions=5, best=2, one=1, two=1, worse=1, worst=3.0)
    ties.add(ties)
    assert (ties.positions, ties.worse, ties.worst) == (10, 2, 3.0)
    assert count_ties(model, [0], []) == Ties()


def test_number_that_is_none_is_never_right() -> None:
    assert count_ties(Says([1.0, float("nan")], HALF), [0], [0]).worse == 1


def test_drawn_tokens_are_judged_with_their_noise() -> None:
    model, noise = Says([0.0] * 16, torch.float32), GumbelNoise(3, 16, torch.device("cpu"))
    reply = [int(noise.at(2 + index).argmax()) for index in range(6)]
    assert count_ties(model, [0, 0], reply, noise).best == 6
    moved = [(token + 1) % 16 for token in reply]
    assert count_ties(model, [0, 0], moved, noise).worse == 6


def test_place_of_the_first_difference() -> None:
    assert compare([1, 2], [1, 2]) is None
    assert compare([1, 2, 3], [1, 9, 3]) == 1
    assert compare([1, 2], [1, 2, 3]) == 2


def test_reply_is_excused_for_ties_alone() -> None:
    model = Says([1.0, 1.0, 0.0], torch.float32)
    assert compare_outputs(model, [0], [0, 0, 0], [0, 0, 0]) == "equal"
    assert compare_outputs(model, [0], [0, 0, 0], [0, 1, 0]) == "tie"
    assert compare_outputs(model, [0], [0, 0, 0], [0, 1, 2]) == "different"
    assert compare_outputs(model, [0], [0, 0, 0], [0, 0]) == "different"
