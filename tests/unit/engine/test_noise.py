"""Noise that is keyed, reproducible and Gumbel."""

from __future__ import annotations

import numpy as np
import torch

from retrieval_draft.engine.noise import GumbelNoise

CPU = torch.device("cpu")


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
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_of_any_size() -> None:
    for seed in (-5, 0, 2**63, 2**70):
        assert GumbelNoise(seed, 10, CPU).at(0).isfinite().all()


def test_moments_are_those_of_gumbel() -> None:
    noise = torch.cat([GumbelNoise(0, 100_000, CPU).at(position) for position in range(5)]).double()
    assert abs(float(noise.mean()) - np.euler_gamma) < 0.01
    assert abs(float(noise.var()) - np.pi**2 / 6) < 0.02


def test_argmax_follows_the_softmax() -> None:
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    noise = GumbelNoise(3, 4, CPU)
    draws = 20_000
    counts = torch.zeros(4)
    for position in range(draws):
        counts[(probs.log() + noise.at(position)).argmax()] += 1
    chi_square = float(((counts - draws * probs) ** 2 / (draws * probs)).sum())
    assert chi_square < 16.3  # 0.1 percent, 3 degrees of freedom
