"""The sampler against transformers' processors, run in full, and the noise's whole vector."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    LogitNormalization,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from retrieval_draft.engine.logits import BestLogits, Wanted
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.engine.sampling.sampling import Sampler
from retrieval_draft.errors import InvalidInputError, NonFiniteLogitsError

CPU = torch.device("cpu")
INTERPRETED = bool(os.environ.get("NUMBA_DISABLE_JIT"))
VOCABULARY = 1200
TURNS = 3 if INTERPRETED else 25
CLOSE = 1e-5 if INTERPRETED else 3e-6  # compiled sums run in lanes, which rounds less
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:divide by zero")

LISTS: dict[str, list[Any]] = {
    "nothing": [],
    "temperature": [TemperatureLogitsWarper(0.7)],
    "all warpers": [
        TemperatureLogitsWarper(1.5), TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05),
    ],
    "penalty": [RepetitionPenaltyLogitsProcessor(1.4), TemperatureLogitsWarper(0.9), TopPLogitsWarper(0.8)],
    "head alone": [RepetitionPenaltyLogitsProcessor(1.4), NoRepeatNGramLogitsProcessor(2)],
    "normalised": [TemperatureLogitsWarper(0.9), TopKLogitsWarper(20), LogitNormalization()],
}  # fmt: skip


def step(position: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(position)
    row = torch.randn(VOCABULARY, generator=generator) * 3
    return row, torch.randint(0, VOCABULARY, (1, 30), generator=generator)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_are_those_of_the_processors_and_the_noise(
    name: str, greedy: bool, dtype: torch.dtype
) -> None:
    processors = LogitsProcessorList(LISTS[name])
    noise = None if greedy else GumbelNoise(6, VOCABULARY, CPU)
    fast = Sampler(processors, noise, keep_logprob=True)
    full = Sampler(processors, noise, keep_scores=True, keep_logits=True, keep_logprob=True)
    expected = []
    for position in range(TURNS):
        row, ids = step(position)
        row = row.to(dtype)
        before = row.clone()
        scores = processors(ids, row[None].to(torch.float32, copy=True))
        token = int((scores if noise is None else scores + noise.at(position)).argmax())
        expected.append(float(scores.double().log_softmax(-1)[0, token]))
        assert fast.choose(row, ids, position) == token
        assert full.choose(row, ids, position) == token
        assert torch.equal(row, before)
        assert full.scores is not None
        assert full.logits is not None
        assert torch.equal(full.scores[-1], scores)
        assert torch.equal(full.logits[-1], before[None].float())
    assert fast.scores is None
    assert fast.logits is None
    assert fast.logprobs == pytest.approx(expected, abs=CLOSE)
    assert full.logprobs == pytest.approx(expected, abs=CLOSE)
    assert fast.logprob == pytest.approx(sum(expected), abs=1e-4)


def test_greedy_takes_the_lowest_of_scores_that_division_made_equal() -> None:
    temperature = TemperatureLogitsWarper(1.1)
    steps = 1.5 + torch.arange(64) * 2.0**-23
    equal = temperature(None, steps).diff() == 0
    low = steps[int(equal.long().argmax())]
    row = torch.full((VOCABULARY,), float(low))
    row[700] = low + 2.0**-23
    assert row[700] > row[0]
    assert float(temperature(None, row)[700]) == float(temperature(None, row)[0])
    assert Sampler([temperature], None).choose(row, torch.zeros(1, 1, dtype=torch.long), 0) == 0
    assert Sampler([], None).choose(row, torch.zeros(1, 1, dtype=torch.long), 0) == 700


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("name", ["nothing", "all warpers", "penalty"])
def test_scores_without_a_law_are_reported_and_infinity_has_an_argmax(name: str, greedy: bool) -> None:
    noise = None if greedy else GumbelNoise(6, VOCABULARY, CPU)
    sampler = Sampler(LogitsProcessorList(LISTS[name]), noise, keep_logprob=True)
    row, ids = step(0)
    banned = torch.full_like(row, -float("inf"))
    row[1000] = float("inf")
    if greedy:
        assert sampler.choose(banned, ids, 5) == 0
        assert sampler.choose(row, ids, 5) == 1000
    else:  # as torch.multinomial
        with pytest.raises(InvalidInputError, match="no token to choose at position 5"):
            sampler.choose(banned, ids, 5)
        with pytest.raises(NonFiniteLogitsError, match="infinite at position 5"):
            sampler.choose(row, ids, 5)
    row[[1000, 1100]] = torch.tensor([0.0, float("nan")])
    with pytest.raises(NonFiniteLogitsError, match="position 5"):
        sampler.choose(row, ids, 5)


@pytest.mark.parametrize("greedy", [False, True])
def test_processors_that_ban_every_token_are_told_from_a_model_that_returns_nan(greedy: bool) -> None:
    class BanAll(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return torch.full_like(scores, -float("inf"))

    row, ids = step(0)
    noise = None if greedy else GumbelNoise(6, VOCABULARY, CPU)
    sampler = Sampler(LogitsProcessorList([BanAll(), LogitNormalization()]), noise)
    with pytest.raises(InvalidInputError, match="ban every one"):
        sampler.choose(row, ids, 5)
    row[3] = float("nan")
    with pytest.raises(NonFiniteLogitsError, match="model returned NaN"):
        sampler.choose(row, ids, 5)


@pytest.mark.parametrize("size", [torch.finfo(torch.float32).min, -1e30, 1e12, 3e38])
@pytest.mark.parametrize("warpers", [[], [TopKLogitsWarper(7)]], ids=["alone", "top-k"])
def test_scores_too_large_for_noise_beside_them_are_drawn_by_their_differences(
    size: float, warpers: list[Any]
) -> None:
    """`remove_invalid_values` makes the lowest number of -inf; a softmax of equal numbers is uniform."""
    noise = GumbelNoise(6, 300, CPU)
    sampler = Sampler(LogitsProcessorList(warpers), noise)
    row, ids = torch.full((300,), size), torch.zeros((1, 1), dtype=torch.int64)
    drawn = [sampler.choose(row, ids, position) for position in range(9)]
    assert drawn == [int(noise.at(position).argmax()) for position in range(9)]


def test_processors_may_write_into_their_input_but_not_into_the_row() -> None:
    class Ban(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, : VOCABULARY - 1] = -float("inf")
            return scores

    row, ids = step(1)
    before = row.clone()
    for keep in (False, True):
        sampler = Sampler(LogitsProcessorList([Ban()]), None, keep_logits=keep)
        assert sampler.choose(row, ids, 0) == VOCABULARY - 1
        assert torch.equal(row, before)
        assert sampler.logits is None or torch.equal(sampler.logits[0][0], before)


def test_kept_tensors_do_not_share_the_rows_memory() -> None:
    row, ids = step(1)
    sampler = Sampler([], GumbelNoise(6, VOCABULARY, CPU), keep_scores=True, keep_logits=True)
    sampler.choose(row, ids, 0)
    before = row.clone()
    row.zero_()
    assert sampler.scores is not None
    assert sampler.logits is not None
    assert torch.equal(sampler.scores[0][0], before)
    assert torch.equal(sampler.logits[0][0], before)


def warped(top_k: int, temperature: float = 0.7, top_p: float = 0.9) -> LogitsProcessorList:
    return LogitsProcessorList(
        [TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)]
    )


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_the_best_logits_choose_as_all_of_them_do(temperature: float) -> None:
    vocabulary = 3000
    noise = GumbelNoise(5, vocabulary, torch.device("cpu"))
    processors = warped(20, temperature)
    one, other = (Sampler(processors, noise, keep_logprob=True) for _ in range(2))
    assert one.wanted == Wanted(128)
    for position in range(100):
        logits = 3 * torch.randn(4, vocabulary)
        values, tokens = logits.topk(one.wanted.best)
        best = BestLogits(tokens.int().numpy(), values.numpy(), vocabulary)
        ids = torch.zeros((1, 3), dtype=torch.int64)
        assert one.choose_among(best, 2, position) == other.choose(logits[2], ids, position)
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)


def test_ties_beyond_the_best_logits_are_left_to_all_of_them() -> None:
    vocabulary = 1000
    sampler = Sampler(warped(20), GumbelNoise(5, vocabulary, torch.device("cpu")))
    logits = torch.zeros(1, vocabulary)
    logits[0, :10] = 5
    values, tokens = logits.topk(sampler.wanted.best)
    best = BestLogits(tokens.int().numpy(), values.numpy(), vocabulary)
    assert sampler.choose_among(best, 0, 3) is None
    logits[0, :20] = 5
    values, tokens = logits.topk(sampler.wanted.best)
    assert sampler.choose_among(BestLogits(tokens.int().numpy(), values.numpy(), vocabulary), 0, 3) in range(
        20
    )


def test_samplers_want_few_logits_and_all_where_more_may_decide() -> None:
    noise, top_k, top_p = GumbelNoise(5, 1000, CPU), TopKLogitsWarper(20), TopPLogitsWarper(0.9)
    candidates, penalty = Wanted(candidates=True), RepetitionPenaltyLogitsProcessor(1.2)
    wanted: list[tuple[list[Any], Wanted]] = [
        ([], candidates),
        ([TemperatureLogitsWarper(0.5)], candidates),
        ([top_k], Wanted(128)),
        ([top_p, top_k], Wanted(128, candidates=True)),
        ([TopKLogitsWarper(100)], Wanted(128, candidates=True)),
        ([TopKLogitsWarper(200), top_p], Wanted()),
        ([top_p, TemperatureLogitsWarper(0.5)], Wanted()),
        ([penalty, top_k], Wanted(128, candidates=True, penalties=True)),
        ([NoRepeatNGramLogitsProcessor(2), top_k], Wanted()),
        ([penalty, NoRepeatNGramLogitsProcessor(2)], Wanted()),
    ]
    for processors, parts in wanted:
        assert Sampler(LogitsProcessorList(processors), noise).wanted == parts
    assert Sampler(LogitsProcessorList([penalty]), None).wanted == Wanted(candidates=True, penalties=True)
    assert Sampler(LogitsProcessorList([top_k]), None).wanted == Wanted()
    for kept in ({"keep_scores": True}, {"keep_logits": True}, {"keep_top": 3}):
        assert Sampler(LogitsProcessorList([top_k]), noise, **kept).wanted == Wanted()
