from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.drafting.cost import SETTLED, SIZES, CostModel

STOCK = {1: 1.0, 2: 1.7, 4: 2.7, 8: 2.9, 16: 3.4, 32: 4.4, 64: 6.5}
FLAT = {size: 1.0 + 0.001 * size for size in SIZES}


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
    assert curve(noisy).seconds(8) == pytest.approx(2.7)
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
        cost.note_step(2, 0.2, 0.2)
    assert cost.choose(doubtful) == alone, "at its own rate or below nothing changes"
    for _ in range(300):
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
            cost.note_step(1, 0.1 + overhead, 0.1)
        counts.append(cost.choose(probs))
    assert counts == [0, 8]


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
