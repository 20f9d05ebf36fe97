"""Drafts ranked by the noise that draws: more are right where guesses are distributions, else none lost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retrieval_draft._kernels.race import arrival, position_key
from retrieval_draft.drafting._kernels import fusion
from retrieval_draft.drafting._kernels.sharpen import sharpen, sharpened
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.fusion import fuse
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.index.source import Proposal

VOCABULARY = 40
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


def noise(seed: int) -> GumbelNoise:
    return GumbelNoise(seed, VOCABULARY, torch.device("cpu"))


def guesses(tokens: list[int], parents: list[int], probs: list[float], source: str = "adjacency") -> Proposal:
    size = len(tokens)
    return Proposal(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.array(probs, np.float32),
        np.full(size, 3, np.int32),
        source,
        "request",
    )


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_formula_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 6))
    tokens = rng.permutation(VOCABULARY + 2)[: count + 1].astype(np.int32)  # two have no noise
    probs = np.append(0.0, rng.dirichlet(np.ones(count + 1))[:count] * rng.choice([0.5, 1.0, 1.5]))
    siblings = np.array([-1, *range(2, count + 1), -1], np.int32)
    weights = np.tile((0.7, 0.1), (fusion.MASKS, 1))
    key, position = noise(seed).sample_key, int(rng.integers(0, 1000))
    found, evidence = probs.copy(), np.zeros((count + 1, 2), np.float32)
    masks = np.full(count + 1, 2, np.int64)
    sharpen(1, siblings, tokens, masks, key, position, VOCABULARY, weights, found, evidence, 0)

    drawn = np.uint64(position_key(key, position))
    times = {int(t): arrival(drawn, int(t), VOCABULARY) for t in tokens[1:] if t < VOCABULARY}
    left = max(1 - probs[1:].sum(), 0.001)
    for node in range(1, count + 1):
        m = min(max(probs[node], 1e-6), 0.999)
        odds, shift = math.log(m / (1 - m)), 0.0
        if int(tokens[node]) in times:
            strengths = {
                int(t): p / times[int(t)]
                for t, p in zip(tokens[1:], probs[1:], strict=True)
                if int(t) in times
            }
            own = strengths.pop(int(tokens[node]))
            shift = min(max(math.log(own / (sum(strengths.values()) + left)) - odds, -6), 6)
        assert evidence[node].tolist() == pytest.approx([odds, shift], abs=1e-4)
        expected = 1 / (1 + math.exp(-(odds + 0.7 * shift + 0.1)))
        assert found[node] == pytest.approx(min(max(expected, 1e-6), 0.999), rel=1e-6)


def test_without_noise_or_its_evidence_nothing_changes() -> None:
    proposal = guesses([1, 2, 3, 4], [-1, -1, 0, 0], [0.5, 0.3, 0.6, 0.2])
    plain = fuse(7, [proposal], Calibration(), 4)
    opened = Calibration(without=["noise"]).open(noise=noise(1))
    opened.position = 5
    same = fuse(7, [proposal], opened, 4)
    for name in ("tokens", "parents", "probs", "path_probs", "evidence"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(same, name))


def accepted(
    calibration: Calibration, distribution: np.ndarray, informed: bool, steps: int, told: bool
) -> float:
    """Share of steps in which the one node that is verified is what the target draws.

    Args:
        distribution: The target's, of which the source knows the three most probable tokens.
        informed: Whether what is drawn follows `distribution`; else it is the first or the third token,
            whatever the noise says of them.
        told: Whether the draft's ranking knows the noise.
    """
    best = np.argsort(-distribution)[:3]
    rng = np.random.default_rng(0)
    right = 0
    for seed in range(steps):
        drawn_with = noise(seed)
        opened = calibration.open(noise=drawn_with if told else None)
        opened.position = 9
        proposal = guesses(best.tolist(), [-1] * 3, distribution[best].tolist())
        tree = fuse(0, [proposal], opened, 3)
        if informed:
            drawn = drawn_with.draw(torch.from_numpy(np.log(distribution)).float(), 9)
        else:
            drawn = int(best[0] if rng.random() < 0.6 else best[2])
        right += int(tree.tokens[1]) == drawn
        opened.observe(tree, [proposal], np.array([drawn], np.int32))
    return right / steps


def test_where_guesses_are_the_law_the_noise_tells_which_is_drawn() -> None:
    distribution = np.random.default_rng(3).dirichlet(np.full(VOCABULARY, 0.1))
    without = accepted(Calibration(), distribution, informed=True, steps=1500, told=False)
    known = accepted(Calibration(), distribution, informed=True, steps=1500, told=True)
    assert without == pytest.approx(distribution.max(), abs=0.05), "the most probable token, every time"
    assert known > without + 0.2
    assert known > 0.9 * np.sort(distribution)[-3:].sum()


def test_where_the_noise_says_nothing_nothing_is_lost_for_long() -> None:
    distribution = np.full(VOCABULARY, 0.1 / (VOCABULARY - 3))
    distribution[[4, 9, 2]] = 0.45, 0.25, 0.2
    calibration = Calibration()
    accepted(calibration, distribution, informed=False, steps=3000, told=True)
    known = accepted(calibration, distribution, informed=False, steps=1500, told=True)
    assert known > 0.6 - 0.06, "the first token, as without noise"


def test_probabilities_given_the_noise_come_true() -> None:
    distribution = np.random.default_rng(5).dirichlet(np.full(VOCABULARY, 0.2))
    best = np.argsort(-distribution)[:6]
    calibration = Calibration()
    guessed, came = [], []
    for seed in range(4000):
        drawn_with = noise(seed)
        opened = calibration.open(noise=drawn_with)
        opened.position = 3
        tree = fuse(0, [proposal := guesses(best.tolist(), [-1] * 6, distribution[best].tolist())], opened, 6)
        drawn = drawn_with.draw(torch.from_numpy(np.log(distribution)).float(), 3)
        if seed >= 1000:
            guessed += tree.probs[1:].tolist()
            came += [int(token) == drawn for token in tree.tokens[1:]]
        opened.observe(tree, [proposal], np.array([drawn], np.int32))
    predicted, outcomes = np.array(guessed), np.array(came)
    bins = (predicted * 5).astype(int).clip(0, 4)
    error = sum(
        abs(predicted[bins == b].mean() - outcomes[bins == b].mean()) * (bins == b).mean() for b in set(bins)
    )
    assert error < 0.08, "odds are shifted, not computed: good for order and budget, not exact"


def test_what_was_learned_of_noise_is_kept(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    calibration = Calibration()
    calibration.sharpness[2] = 1.25, -0.5
    calibration.save(folder / "c.safetensors")
    other = Calibration()
    other.load(folder / "c.safetensors")
    np.testing.assert_allclose(other.sharpness, calibration.sharpness)


def test_sharpened_is_bounded() -> None:
    assert sharpened(50.0, 6.0, 3.0, 0.0) == 0.999
    assert sharpened(-50.0, -6.0, 3.0, 0.0) == 1e-6
