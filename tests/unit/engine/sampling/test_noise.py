"""Noise that is keyed, reproducible and Gumbel, and draws that make little of it."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from retrieval_draft._kernels import race
from retrieval_draft.engine.sampling.noise import GumbelNoise, candidates, position_keys
from retrieval_draft.errors import NonFiniteLogitsError

CPU = torch.device("cpu")
INTERPRETED = bool(os.environ.get("NUMBA_DISABLE_JIT"))
VOCABULARIES = [1, 97, 255, 256, 257, 1000] + [70_001] * (not INTERPRETED)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # SplitMix64 wraps, numpy scalars warn


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def exponential(random: NDArray[np.uint64]) -> NDArray[np.float64]:
    return -np.log1p(-((random >> np.uint64(11)) + 0.5) * 2.0**-53)


def gumbel_numpy(key: np.uint64, vocabulary: int) -> NDArray[np.float32]:
    """The definition in _kernels/race.py, all tokens at once."""
    tokens = np.arange(vocabulary)
    begins = np.arange(0, vocabulary, race.BLOCK)
    widths = np.minimum(race.BLOCK, vocabulary - begins)
    blocks = mix((key ^ race.BLOCKS) + np.arange(1, len(begins) + 1).astype(np.uint64) * race.STEP)
    first = exponential(blocks) / widths
    winners = begins + (
        (mix(blocks + race.STEP) >> np.uint64(32)) * widths.astype(np.uint64) >> np.uint64(32)
    )
    later = exponential(mix(key + (tokens + 1).astype(np.uint64) * race.STEP))
    arrivals = np.repeat(first, widths) + later
    arrivals[winners.astype(np.int64)] = first
    return (-np.log(arrivals)).astype(np.float32)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_vector_tokens_and_numpy_say_the_same(vocabulary: int) -> None:
    noise = GumbelNoise(5, vocabulary, CPU, sample=2)
    for position in (0, 1, 7, 100_000):
        vector = noise.at(position)
        assert vector.dtype == torch.float32
        assert vector.shape == (vocabulary,)
        np.testing.assert_allclose(
            vector, gumbel_numpy(noise.key(position), vocabulary), rtol=1e-6, atol=1e-6
        )
        tokens = np.random.default_rng(position).integers(0, vocabulary, 300)
        some = noise.of(position, tokens)
        assert some.dtype == np.float32
        np.testing.assert_allclose(vector[tokens], some, rtol=1e-6, atol=1e-6)


def test_keys_are_those_of_the_kernels() -> None:
    noise = GumbelNoise(2**63 - 1, 700, CPU, sample=3)
    for position in (0, 5, 2**31):
        key = race.position_key(noise.sample_key, position)
        assert int(key) == int(noise.key(position))
        one = -np.log(race.arrival(np.uint64(key), 699, 700))
        np.testing.assert_allclose(one, noise.of(position, np.array([699]))[0], rtol=1e-6)


def test_same_key_same_noise_and_any_other_key_other_noise() -> None:
    noise = GumbelNoise(1, 500, CPU).at(3)
    assert torch.equal(noise, GumbelNoise(1, 500, CPU).at(3))
    for other in (
        GumbelNoise(2, 500, CPU).at(3),
        GumbelNoise(1, 500, CPU).at(4),
        GumbelNoise(1, 500, CPU, 1).at(3),
    ):
        assert not torch.isclose(noise, other).any()


def test_state_is_not_shared_with_torch() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    GumbelNoise(1, 10, CPU).at(0)
    GumbelNoise(1, 10, CPU).draw(torch.zeros(10), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_of_any_size() -> None:
    for seed in (-5, 0, 2**63, 2**70):
        assert GumbelNoise(seed, 10, CPU).at(0).isfinite().all()
        assert 0 <= GumbelNoise(seed, 10, CPU).draw(torch.zeros(1, 10), 0) < 10


def test_moments_are_those_of_gumbel() -> None:
    noise = torch.cat([GumbelNoise(0, 100_000, CPU).at(position) for position in range(5)]).double()
    assert abs(float(noise.mean()) - np.euler_gamma) < 0.01
    assert abs(float(noise.var()) - np.pi**2 / 6) < 0.02


def test_tokens_of_a_block_are_independent_of_each_other_and_of_the_next_block() -> None:
    rows = np.stack([GumbelNoise(seed, 300, CPU).at(0).numpy() for seed in range(4000)])
    correlation = np.corrcoef(rows[:, [0, 1, 128, 255, 256, 299]].T)
    assert np.abs(correlation - np.eye(6)).max() < 0.08  # five standard deviations


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 12.0])
def test_draw_is_the_argmax_of_scores_and_noise(vocabulary: int, spread: float) -> None:
    noise = GumbelNoise(9, vocabulary, CPU)
    torch.manual_seed(vocabulary)
    for position in range(10 if INTERPRETED else 100):
        scores = torch.randn(vocabulary) * spread
        scores[torch.rand(vocabulary) < 0.3] = -float("inf")
        before = scores.clone()
        assert noise.draw(scores, position) == int((scores + noise.at(position)).argmax())
        assert torch.equal(scores, before)


def test_draw_in_other_shapes_and_precisions() -> None:
    noise = GumbelNoise(9, 600, CPU)
    for position in range(20):
        scores = (torch.randn(600) * 3).bfloat16()
        expected = int((scores.float() + noise.at(position)).argmax())
        assert noise.draw(scores, position) == expected
        assert noise.draw(scores[None], position) == expected
        assert noise.draw(scores.float()[None], position) == expected
        assert noise.draw(scores.float().repeat(2, 1).T.contiguous().T[1], position) == expected


@pytest.mark.parametrize("vocabulary", [1, 50, 700])
def test_rows_without_a_choice(vocabulary: int) -> None:
    noise = GumbelNoise(9, vocabulary, CPU)
    assert noise.draw(torch.full((vocabulary,), -float("inf")), 4) == 0
    one = torch.full((vocabulary,), -float("inf"))
    one[-1] = -1e30
    assert noise.draw(one, 4) == vocabulary - 1
    one[-1] = float("inf")
    assert noise.draw(one, 4) == vocabulary - 1


@pytest.mark.parametrize("vocabulary", [1, 50, 700])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_reported_wherever_it_is(vocabulary: int, sign: float) -> None:
    for at in {0, vocabulary // 2, vocabulary - 1}:
        scores = torch.full((vocabulary,), 50.0)
        scores[at] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
        with pytest.raises(NonFiniteLogitsError, match="position 12"):
            GumbelNoise(9, vocabulary, CPU).draw(scores, 12)


@pytest.mark.parametrize("keyed", ["draw", "at"])
def test_draws_follow_the_softmax(keyed: str) -> None:
    probs = torch.zeros(600)
    probs[[0, 3, 255, 256, 599]] = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.1])
    noise = GumbelNoise(3, 600, CPU)
    draws = 2_000 if INTERPRETED else 20_000
    counts = torch.zeros(600)
    for position in range(draws):
        if keyed == "draw":
            counts[noise.draw(probs.log(), position)] += 1
        else:
            counts[(probs.log() + noise.at(position)).argmax()] += 1
    kept = probs > 0
    assert counts[~kept].sum() == 0
    expected = draws * probs[kept]
    assert (
        float(((counts[kept] - expected) ** 2 / expected).sum()) < 18.5
    )  # 0.1 percent, 4 degrees of freedom


def test_noise_is_the_same_in_every_release() -> None:
    """A seed that someone wrote down must draw the same text in the next release."""
    noise = GumbelNoise(1234, 300, CPU, sample=2).of(7, np.array([0, 50, 299]))
    np.testing.assert_allclose(noise, [7.184341, -1.35277, -1.107473], atol=2e-6)


@pytest.mark.parametrize("vocabulary", [97, 256, 1200, 40_000])
def test_the_candidates_have_the_largest_sums(vocabulary: int) -> None:
    noise = GumbelNoise(3, vocabulary, CPU)
    positions = torch.tensor([0, 5, 1 << 40])
    keys = position_keys(torch.from_numpy(np.array([noise.sample_key]).view(np.int64)), positions)
    assert keys.numpy().view(np.uint64).tolist() == [int(noise.key(int(at))) for at in positions]
    scores = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(2)) * 3
    scores[2, 4:] = -torch.inf
    tokens, sums, bounds = candidates(scores, keys, 8)
    for row in range(3):
        full = scores[row].double() + noise.at(int(positions[row])).double()
        best = full.topk(9)
        others = full.index_fill(0, tokens[row], -torch.inf)
        assert bounds[row] >= others.max() - 1e-4
        known = best.values[:8] > bounds[row] + 1e-4
        assert known[0] or vocabulary > 64 * 256, "all blocks are looked at"
        assert torch.equal(tokens[row][known], best.indices[:8][known])
        assert torch.allclose(sums[row][known], best.values[:8][known], atol=1e-4)
        if row == 2:
            assert sums[row].isfinite().sum() == known.sum() == 4
        assert tokens[row].max() < vocabulary
