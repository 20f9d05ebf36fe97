from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.drafting.cost import SETTLED, SIZES, CostModel

STOCK = {1: 1.0, 2: 1.7, 4: 2.7, 8: 2.9, 16: 3.4, 32: 4.4, 64: 6.5}
FLAT = {size: 1.0 + 0.001 * size for size in SIZES}

FLAT_CPU = {1: 0.034, 2: 0.036, 4: 0.038, 8: 0.04, 16: 0.047, 32: 0.09, 64: 0.18}


def curve(seconds: dict[int, float]) -> CostModel:
    model = CostModel()
    model.load(seconds)
    return model


def test_doubtful_drafts_are_left_out_where_a_second_token_is_dear() -> None:
    model = curve(STOCK)
    assert model.choose(np.array([0.5, 0.4, 0.1], np.float32)) == 0
    assert model.choose(np.full(15, 0.99, np.float32).cumprod()) >= 8


def test_everything_is_verified_where_nodes_are_free() -> None:
    assert curve(FLAT).choose(np.linspace(0.5, 0.1, 60).astype(np.float32)) == 60


def test_the_choice_is_the_best_of_all_budgets() -> None:
    model = curve(STOCK)
    rng = np.random.default_rng(0)
    for _ in range(50):
        probs = np.sort(rng.random(40).astype(np.float32))[::-1]
        rates = [(1 + probs[:n].sum()) / model.seconds(n + 1) for n in range(41)]
        assert model.choose(probs) == int(np.argmax(rates))


def test_nothing_to_verify() -> None:
    assert curve(STOCK).choose(np.empty(0, np.float32)) == 0
    assert CostModel().choose(np.ones(3, np.float32)) == 0


def test_real_passes_move_the_curve_but_one_stall_does_not() -> None:
    model = curve(STOCK)
    model.observe(1, 0, 100.0)
    assert model.seconds(1) < 1.2
    for _ in range(80):
        model.observe(8, 5000, 6.0)
    assert model.seconds(8) == pytest.approx(6.0, rel=0.05)
    assert model.seconds(4) > STOCK[4]
    curve_now = list(model.seconds_by_size().values())
    assert curve_now == sorted(curve_now)


def test_more_tokens_never_cost_less() -> None:
    noisy = dict(STOCK)
    noisy[8] = 2.0
    curve_now = list(curve(noisy).seconds_by_size().values())
    assert curve_now == sorted(curve_now)
    assert 2.0 < curve(noisy).seconds(8) == curve(noisy).seconds(4) < 2.7
    assert curve(STOCK).seconds(200) > STOCK[64]


def test_measuring_calls_every_size_and_takes_the_least() -> None:
    calls: list[int] = []
    ticks: list[int] = []
    model = CostModel.measure(calls.append, progress=lambda: ticks.append(1))
    assert set(calls) == set(SIZES)
    assert len(ticks) == 2 * len(SIZES)
    assert model.is_measured


def test_a_node_must_beat_the_tokens_a_second_of_late() -> None:
    cost = CostModel()
    cost.load({size: 0.1 + 0.01 * (size - 1) for size in SIZES})
    doubtful = np.full(20, 0.12, np.float32)
    alone = cost.choose(doubtful)
    for _ in range(SETTLED):
        cost.choose(doubtful)
        cost.note_step(2, 0.2, 0.2)
    assert cost.choose(doubtful) == alone, "at its own rate or below nothing changes"
    for _ in range(300):
        cost.choose(doubtful)
        cost.note_step(5, 0.2, 0.2)
    assert alone == 20
    assert cost.choose(doubtful) == 0, "12 tokens a second, where others bring 25"
    assert cost.choose(np.full(20, 0.9, np.float32)) == 20


def test_the_loops_own_time_makes_larger_trees_pay() -> None:
    probs = np.full(8, 0.25, np.float32)
    counts = []
    for overhead in (0.0, 0.05):
        cost = CostModel()
        cost.load({size: 0.1 + 0.028 * (size - 1) for size in SIZES})
        for _ in range(50):
            cost.choose(probs)
            cost.note_step(1, 0.1 + overhead, 0.1)
        counts.append(cost.choose(probs))
    assert counts == [0, 8]


def _decode(cost: CostModel, true: dict[int, float], steps: int, seed: int) -> float:
    """Tokens a second of the last half of so many simulated steps, in which passes take `true` seconds."""
    rng = np.random.default_rng(seed)
    sizes, logs = np.log2(list(true)), np.log(list(true.values()))
    emitted = spent = 0.0
    for step in range(steps):
        depth = int(rng.integers(1, 40))
        probs = np.sort(rng.beta(5, 2) ** np.arange(1, depth + 1) * rng.uniform(0.5, 1, depth))[::-1]
        nodes = cost.choose(probs.astype(np.float32), 100)
        seconds = float(np.exp(np.interp(np.log2(nodes + 1), sizes, logs)) * rng.lognormal(0, 0.05))
        tokens = 1 + float(probs[:nodes].sum())
        cost.observe(nodes + 1, 100, seconds)
        cost.note_step(round(tokens), seconds, seconds)
        if step >= steps // 2:
            emitted, spent = emitted + tokens, spent + seconds
    return emitted / spent


@pytest.mark.parametrize("dear", [False, True])
@pytest.mark.parametrize("factor", [5.0, 0.2])
@pytest.mark.parametrize("of_all", [False, True])
def test_a_curve_that_is_wrong_by_five_times_heals_in_200_steps(
    dear: bool, factor: float, of_all: bool
) -> None:
    """Curves that call drafts too dear are the hard ones: drafts that are not verified are not timed."""
    true = {size: 0.02 * size**0.97 if dear else 0.03 + 0.0007 * size for size in SIZES}
    wrong = {size: each * (factor if size > 1 or of_all else 1.0) for size, each in true.items()}
    ratios = [
        _decode(curve(wrong), true, 400, seed) / _decode(curve(true), true, 400, seed) for seed in (0, 1)
    ]
    assert min(ratios) > 0.95


def test_trials_take_a_small_share_of_the_time() -> None:
    """Drafts that never pay: a trial every now and then is all that is lost."""
    cost = curve({size: 0.03 * size for size in SIZES})
    spent, plain = 0.0, 0.0
    trials = 0
    for _ in range(4000):
        nodes = cost.choose(np.full(12, 0.1, np.float32), 100)
        trials += nodes > 0
        seconds = 0.03 * (1 + nodes)
        cost.observe(1 + nodes, 100, seconds)
        cost.note_step(1, seconds, seconds)
        spent, plain = spent + seconds, plain + 0.03
    assert trials >= 5
    assert spent < 1.01 * plain


def test_a_busy_minute_is_forgotten_within_two_seconds() -> None:
    cost = curve(FLAT_CPU)
    probs = np.array([0.8, 0.6, 0.5, 0.4], np.float32)
    usual = cost.choose(probs)
    for factor, steps in ((3.0, 500), (1.0, 50)):
        for _ in range(steps):
            nodes = cost.choose(probs)
            seconds = factor * float(np.interp(nodes + 1, SIZES, list(FLAT_CPU.values())))
            cost.observe(nodes + 1, 100, seconds)
            cost.note_step(1 + nodes // 2, seconds, seconds)
    assert cost.seconds(1) == pytest.approx(FLAT_CPU[1], rel=0.1)
    assert cost.choose(probs) == usual


def test_a_chain_is_priced_with_what_its_pass_repeats() -> None:
    model = CostModel()
    model.load({size: float(size) for size in SIZES})  # twice the tokens take twice the time
    likely = np.array([0.98, 0.96, 0.94, 0.92], np.float32)
    assert model.choose(likely, 0) == model.choose(likely, 0, 1, None)
    model.load({size: 1.0 + 0.01 * size for size in SIZES})  # tokens cost next to nothing
    unlikely = np.array([0.5, 0.25, 0.12, 0.06], np.float32)
    assert model.choose(unlikely, 0, 1, 20) > 0
    model.load({size: 0.5 + 0.5 * size for size in SIZES})
    free = model.choose(unlikely, 0, 1, None)
    assert model.choose(unlikely, 0, 1, 30) < max(free, 1), "what is repeated after a refusal costs too"
    certain = np.ones(4, np.float32)
    assert model.choose(certain, 0, 1, 30) == 4, "a chain that is accepted for sure clears all"
