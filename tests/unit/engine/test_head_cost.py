"""The cost of the output head over a prompt, by a clock that a test moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from retrieval_draft.engine import head_cost
from retrieval_draft.engine.head_cost import HeadCost
from retrieval_draft.engine.target import Target
from tests.support.models import make


def test_the_head_runs_over_a_prompt_only_where_that_pays() -> None:
    cost = HeadCost(row=1.0, step=10.0)
    assert cost.paying_rows(100, 1000) == 1
    assert cost.paying_rows(100, 7) == 7
    assert cost.paying_rows(1, 1000) == 1


class Timed(Target):
    """A pass over a text takes 50 and 2 for each row of logits, a step 7; the first of each 100 more."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.now = 0.0
        self.first = {"text", "step"}

    def _take(self, kind: str, seconds: float) -> None:
        self.now += seconds + (100.0 if kind in self.first else 0.0)
        self.first.discard(kind)

    def prefill(self, cache: Any, prompt: Any, rows: int, chunk: int | None = None) -> Iterator[torch.Tensor]:
        self._take("text", 50.0 + 2.0 * rows)
        yield from super().prefill(cache, prompt, rows, chunk)

    def verify_tree(self, *given: Any) -> torch.Tensor:
        self._take("step", 7.0)
        return super().verify_tree(*given)


def test_a_row_costs_what_more_rows_take_and_a_step_what_one_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Timed(make("llama"))
    monkeypatch.setattr(head_cost, "_now", lambda device: target.now)
    assert HeadCost.measure(target) == HeadCost(row=2.0, step=7.0)


@pytest.mark.parametrize("positions", [1, 2, 9])
def test_a_model_of_few_positions_is_measured_within_them(positions: int) -> None:
    target = Target(make("llama", max_position_embeddings=positions))
    assert HeadCost.measure(target).row >= 0
