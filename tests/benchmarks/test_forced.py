"""Recorded replies put into a model's mouth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_check.forced import forced, recorded
from benchmarks.gpu_check.setting import Setting
from retrieval_draft import DraftConfig, RetrievalDrafter
from tests.support.models import make

PROMPT = list(range(5, 25))
REPLY = [7, 8, 9, 10, 11, 12] * 6


@pytest.fixture(scope="module")
def model() -> Any:
    return make("llama")


def replies(drafter: RetrievalDrafter, rows: int, **options: Any) -> list[list[int]]:
    prompt = torch.tensor([PROMPT] * rows)
    return [row[len(PROMPT) :].tolist() for row in drafter.generate(prompt, **options)]


@pytest.mark.parametrize("method", ["none", "calibrated"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_recorded_reply_is_said_whatever_the_model(model: Any, method: str, sampled: bool, rows: int) -> None:
    options = {"max_new_tokens": 30, "do_sample": sampled, **({"seed": 1} if sampled else {})}
    with (
        RetrievalDrafter.for_model(model, config=DraftConfig(method=method, nodes=8)) as drafter,
        forced({tuple(PROMPT): REPLY}),
    ):
        assert replies(drafter, rows, **options) == [REPLY[:30]] * rows
        stats = drafter.stats
    if method == "none":
        assert (stats.accepted, stats.drafted) == (0, 0)
    else:
        assert stats.accepted > 10 * rows  # the reply repeats itself


def test_nothing_stays_forced(model: Any) -> None:
    with RetrievalDrafter.for_model(model, config=DraftConfig(nodes=8)) as drafter:
        before = replies(drafter, 1, max_new_tokens=30, do_sample=False)
        with forced({tuple(PROMPT): REPLY}):
            replies(drafter, 1, max_new_tokens=30, do_sample=False)
        assert replies(drafter, 1, max_new_tokens=30, do_sample=False) == before != [REPLY[:30]]


def test_recorded_replies_are_as_long_and_as_small_as_asked() -> None:
    trace = Setting(torch.device("cpu"), True, None).trace
    found = recorded(trace, 32000, 20, 96)
    assert len(found) == 10
    assert all(len(each.reply) >= 96 for each in found)
    assert recorded(trace, 100, 20, 1) == []
    assert max(np.concatenate([each.prompt for each in found])) < 32000
