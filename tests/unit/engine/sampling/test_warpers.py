"""The kernel of warpers and draw against transformers' own warpers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    LogitNormalization,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from retrieval_draft.engine._kernels.softmax import exp_sum
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.engine.sampling.warpers import Warpers, split

CPU = torch.device("cpu")
INTERPRETED = bool(os.environ.get("NUMBA_DISABLE_JIT"))
TURNS = 3 if INTERPRETED else 30
CHECKED = bool(os.environ.get("NUMBA_BOUNDSCHECK"))
# Compiled sums run in lanes, which rounds less; with a check of each index they run one by one, in float32.
CLOSE = 1e-5 if INTERPRETED else 1e-4 if CHECKED else 3e-6
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:divide by zero")

TAILS: dict[str, list[Any]] = {
    "nothing": [],
    "temperature": [TemperatureLogitsWarper(0.7)],
    "cold": [TemperatureLogitsWarper(1e-4)],
    "hot": [TemperatureLogitsWarper(5.0), TopPLogitsWarper(0.95)],
    "top-k": [TemperatureLogitsWarper(1.3), TopKLogitsWarper(50)],
    "top-k of more than there are": [TopKLogitsWarper(10**6)],
    "top-k 1": [TopKLogitsWarper(1)],
    "top-p": [TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)],
    "top-p at least 7": [TopPLogitsWarper(0.1, min_tokens_to_keep=7)],
    "top-p 0": [TopPLogitsWarper(0.0)],
    "top-p 1": [TopPLogitsWarper(1.0)],
    "min-p": [TemperatureLogitsWarper(0.8), MinPLogitsWarper(0.05)],
    "min-p 1 at least 3": [MinPLogitsWarper(1.0, min_tokens_to_keep=3)],
    "min-p 0": [MinPLogitsWarper(0.0)],
    "all": [
        TemperatureLogitsWarper(1.5),
        TopKLogitsWarper(50),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.05),
    ],
    "all in another order": [
        MinPLogitsWarper(0.01),
        TopPLogitsWarper(0.9),
        TemperatureLogitsWarper(0.5),
        TopKLogitsWarper(9, min_tokens_to_keep=12),
    ],
    "twice": [TopPLogitsWarper(0.9), TopPLogitsWarper(0.9), TopKLogitsWarper(20), TopKLogitsWarper(5)],
}


@pytest.fixture
def higher_ids_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch's choice among equal values ours: the higher id is the larger."""
    sort = torch.sort

    def topk(values: torch.Tensor, k: int, dim: int = -1) -> Any:
        found = sort(values, dim=dim, stable=True)
        return torch.return_types.topk((found.values.flip(dim)[..., :k], found.indices.flip(dim)[..., :k]))

    monkeypatch.setattr(torch, "sort", lambda *args, **options: sort(*args, stable=True, **options))
    monkeypatch.setattr(torch, "topk", topk)


def row_of(kind: str, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    row = torch.randn(vocabulary, generator=generator) * 3
    if kind == "peaked":
        row[: vocabulary // 50 + 1] += 9
    elif kind == "masked":
        row[1:][torch.rand(vocabulary - 1, generator=generator) < 0.9] = -float("inf")
    elif kind == "coarse":
        row = row.round()  # ties everywhere
    elif kind == "equal":
        row = torch.full((vocabulary,), 2.0)
    return row[torch.randperm(vocabulary, generator=generator)]


@pytest.mark.parametrize("vocabulary", [1, 97, 257, 1001, *[9001] * (not INTERPRETED)])
@pytest.mark.parametrize("kind", ["spread", "peaked", "masked", "coarse", "equal"])
@pytest.mark.parametrize("name", TAILS)
def test_choice_and_probability_are_those_of_transformers(
    vocabulary: int, kind: str, name: str, higher_ids_first: None
) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    noise, tail = GumbelNoise(4, vocabulary, CPU), TAILS[name]
    warpers = Warpers(tail)
    for position in range(TURNS):
        row = row_of(kind, vocabulary, generator)
        before = row.clone()
        scores = LogitsProcessorList(tail)(torch.zeros(1, 1, dtype=torch.long), row[None])[0]
        choice = warpers.choose(row, noise.key(position), logprob=True)
        assert torch.equal(row, before)
        if not row.isfinite().any():
            assert choice is not None
            assert choice.token == 0
            continue
        expected = int((scores + noise.at(position)).argmax())
        assert choice is not None
        assert choice.token == expected
        assert choice.logprob == pytest.approx(float(scores.double().log_softmax(-1)[expected]), abs=CLOSE)


@pytest.mark.parametrize("vocabulary", [40, 5000])
def test_every_token_that_is_kept_is_drawn_and_no_other(vocabulary: int) -> None:
    row = torch.full((vocabulary,), -20.0)
    row[[3, 9, 11, 17, 30]] = torch.tensor([2.0, 1.0, 1.0, 0.5, 1.5])
    noise, turns = GumbelNoise(2, vocabulary, CPU), 150 if INTERPRETED else 600
    for tail, expected in (
        ([TopKLogitsWarper(3)], {3, 9, 11, 30}),
        ([TopPLogitsWarper(0.75), TemperatureLogitsWarper(4.0)], {3, 11, 30}),
        ([MinPLogitsWarper(0.3), TemperatureLogitsWarper(4.0)], {3, 9, 11, 30}),
        ([MinPLogitsWarper(0.9, min_tokens_to_keep=2), TemperatureLogitsWarper(4.0)], {3, 30}),
    ):
        drawn = [Warpers(tail).choose(row, noise.key(position)) for position in range(turns)]
        assert {choice.token for choice in drawn if choice} == expected


def test_greedy_takes_the_lowest_id() -> None:
    for vocabulary in (5, 700):
        row = torch.zeros(vocabulary)
        row[[2, 4, vocabulary - 1]] = 7.0
        choice = Warpers().choose(row, None, logprob=True)
        assert choice is not None
        assert choice.token == 2
        assert choice.logprob == pytest.approx(float(row.double().log_softmax(-1)[2]), abs=2 * CLOSE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_for_torch(bad: float) -> None:
    key = GumbelNoise(2, 300, CPU).key(0)
    row = torch.zeros(300)
    assert Warpers().choose(row.double(), key) is None
    assert Warpers().choose(torch.zeros(300, 2)[:, 0], key) is None
    assert Warpers([TemperatureLogitsWarper(1e-39)]).choose(row + 30, key) is None
    row[299] = bad
    assert Warpers([TopKLogitsWarper(5)]).choose(row, key) is None


def test_a_row_that_is_banned_whole_has_an_argmax_and_no_draw() -> None:
    row = torch.full((300,), -float("inf"))
    assert Warpers().choose(row, GumbelNoise(2, 300, CPU).key(0)) is None
    greedy = Warpers().choose(row, None)
    assert greedy is not None
    assert greedy.token == 0


def test_split_takes_the_longest_tail_that_is_known_exactly() -> None:
    class Mine(TopKLogitsWarper):
        pass

    penalty, temperature = RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(0.7)
    top_k, top_p, min_p = TopKLogitsWarper(3), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)
    for processors, heads in (
        ([], 0),
        ([temperature, top_k, top_p, min_p], 0),
        ([penalty, temperature, top_k], 1),
        ([temperature, penalty, top_p], 2),
        ([temperature, TypicalLogitsWarper(0.5), top_p], 2),
        ([temperature, top_p, LogitNormalization()], 3),
        ([temperature, Mine(4), top_p], 2),
        ([temperature, TopKLogitsWarper(4, filter_value=-1.0), top_p], 2),
        ([temperature, top_k, temperature, top_p], 1),
    ):
        assert split(processors) == (processors[:heads], processors[heads:])


@pytest.mark.parametrize("temperature", [1.0, 0.37, 20.0])
def test_exp_sum_is_that_of_numpy(temperature: float) -> None:
    for size, spread in ((1, 1.0), (1023, 8.0), (3000, 0.1), (3000, 60.0)):
        row = (np.random.default_rng(0).standard_normal(size) * spread).astype(np.float32)
        row[size // 2 :: 3] = -np.inf
        row[0] = 5
        scores = row / np.float32(temperature)
        expected = np.exp(scores.astype(np.float64) - scores.max()).sum()
        assert exp_sum(row, np.float32(temperature), scores.max()) == pytest.approx(expected, rel=CLOSE / 3)
    assert exp_sum(np.full(1001, 3.0, np.float32), np.float32(0.7), np.float32(3.0) / np.float32(0.7)) == 1001
