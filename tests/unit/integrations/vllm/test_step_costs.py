"""Lengths at which drafts pay, learned from the times of steps alone."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval_draft.integrations.vllm.row_drafter import RowDrafter
from retrieval_draft.integrations.vllm.step_costs import PLAIN_AGAIN, PLAIN_FIRST, StepCosts
from tests.support.vllm_batch import FakeBatch

FALLING = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]], np.float32)
EIGHT = np.array([8], np.int32)


def learned(seconds: dict[int, float], rows: int = 1, rounds: int = 60) -> StepCosts:
    costs = StepCosts()
    for _ in range(rounds):
        for tokens, time in seconds.items():
            costs.observe(rows, tokens, 100, time)
    return costs


def test_where_more_tokens_cost_nothing_all_are_verified() -> None:
    assert learned({1: 1.0, 4: 1.0, 9: 1.001}).choose(FALLING, EIGHT, 100).tolist()[0] >= 6


def test_where_each_token_costs_a_pass_none_is() -> None:
    assert learned({1: 1.0, 2: 3.0, 4: 6.0, 9: 12.0}).choose(FALLING, EIGHT, 100).tolist() == [0]


def test_plain_steps_come_first_and_now_and_then() -> None:
    costs = StepCosts()
    for _ in range(PLAIN_FIRST):
        assert costs.choose(FALLING, EIGHT, 100).tolist() == [0]
        costs.observe(1, 1, 100, 1.0)
    assert costs.choose(FALLING, EIGHT, 100).tolist()[0] >= 3
    assert costs.choose(FALLING / 20, EIGHT, 100).tolist() == [0]
    for _ in range(PLAIN_AGAIN[0]):
        assert costs.choose(FALLING, EIGHT, 100).tolist()[0] >= 3
        costs.observe(1, 9, 100, 1.4)
    assert costs.choose(FALLING, EIGHT, 100).tolist() == [0]
    costs.observe(1, 1, 100, 1.0)
    assert costs.choose(FALLING, EIGHT, 100).tolist()[0] >= 3


def test_no_draft_below_the_floor_is_chosen() -> None:
    assert StepCosts().min_prob(64, 8) > 0.3
    for rows, seconds in ((1, {1: 1.0, 4: 1.3, 9: 2.0}), (2, {2: 1.0, 4: 1.3, 8: 2.0, 16: 4.5})):
        costs = learned(seconds, rows)
        min_prob = costs.min_prob(rows, 8)
        assert 0.0 <= min_prob < 1.0
        draw = np.random.default_rng(rows)
        for _ in range(200):
            probs = np.sort(draw.random((rows, 8), np.float32), 1)[:, ::-1].copy()
            lengths = costs.choose(probs, np.full(rows, 8, np.int32), 100)
            for row, length in enumerate(lengths.tolist()):
                assert not length or probs[row, length - 1] >= min_prob


def test_a_price_that_was_only_guessed_is_put_to_the_test() -> None:
    """64 rows, where the assumed curve lets hardly a draft pay; on this machine they cost nothing."""
    costs = StepCosts()
    likely = np.full((64, 2), 0.6, np.float32)
    lengths = np.full(64, 2, np.int32)
    verified = []
    for _ in range(600):
        min_prob = costs.min_prob(64, 2)
        chosen = int(costs.choose(likely, lengths, 100).sum()) if min_prob <= 0.6 else 0
        verified.append(chosen)
        costs.observe(64, 64 + chosen, 100, 1.0)
    assert sum(map(bool, verified[:65])) <= 1
    assert sum(map(bool, verified[-50:])) >= 45


def test_where_drafts_do_not_pay_they_are_seldom_tried() -> None:
    costs = StepCosts()
    likely = np.full((64, 2), 0.6, np.float32)
    tried = 0
    for _ in range(4000):
        due = costs.min_prob(64, 2) <= 0.6
        chosen = int(costs.choose(likely, np.full(64, 2, np.int32), 100).sum()) if due else 0
        tried += chosen > 0
        costs.observe(64, 64 + chosen, 100, 1.0 + chosen / 40)
    assert 1 <= tried <= 12


def test_rows_compete() -> None:
    probs = np.array([[0.9, 0.85, 0.8], [0.1, 0.05, 0.0]], np.float32)
    costs = learned({2: 1.0, 4: 1.3, 8: 2.0}, rows=2)
    chosen = costs.choose(probs, np.array([3, 2], np.int32), 100)
    assert chosen.tolist() == [3, 0]
    nothing = costs.choose(np.zeros((2, 3), np.float32), np.zeros(2, np.int32), 100)
    assert nothing.tolist() == [0, 0]


def test_one_stall_at_the_start_or_later_changes_little() -> None:
    costs = StepCosts()
    costs.observe(1, 1, 100, 50.0)
    for _ in range(PLAIN_FIRST + 20):
        costs.observe(1, 1, 100, 1.0)
    before = costs.seconds_by_size()[1]
    assert before == pytest.approx(1.0, rel=0.1)
    costs.observe(1, 1, 100, 500.0)
    assert costs.seconds_by_size()[1] < 1.2


class Scripted:
    """Chains whose texts and probabilities the test chooses."""

    def __init__(self, chain: list[int], probs: list[float]) -> None:
        self.chain, self.probs = chain, probs
        self.opened = 0

    def open(self, prompt: object) -> int:
        self.opened += 1
        return self.opened

    def step(self, ids, new_tokens, counts, max_tokens, min_prob):  # type: ignore[no-untyped-def]
        rows = len(ids)
        tokens = np.full((rows, 4), -1, np.int32)
        tokens[:, : len(self.chain)] = self.chain
        probs = np.zeros((rows, 4), np.float32)
        probs[:, : len(self.chain)] = self.probs
        return tokens, np.full(rows, len(self.chain), np.int32), probs

    def close(self, session: int, *, finished: bool = True) -> None:
        pass


def make(chains: Scripted, clock: list[float], vocabulary: int = 100) -> RowDrafter:
    return RowDrafter(
        chains,
        most=4,
        max_rows=4,
        max_length=1000,
        vocabulary=vocabulary,
        costs=StepCosts(),
        clock=lambda: clock[0],
    )


def test_lengths_follow_the_times_between_calls() -> None:
    """If a pass over four tokens takes four times as long as one over one, drafting stops."""
    clock = [0.0]
    batch = FakeBatch(2, 1000)
    batch.add("a", [1, 2])
    rows = make(Scripted([7, 7, 7], [0.6, 0.4, 0.3]), clock)
    lengths = []
    for _ in range(80):
        [draft] = rows.propose(*batch.step({"a": [5]}))
        clock[0] += 1.0 + 1.2 * len(draft)
        lengths.append(len(draft))
    assert max(lengths[:20]) > 0
    assert lengths[-20:] == [0] * 20


def test_steps_with_prefills_and_waits_between_requests_are_not_timed() -> None:
    clock = [0.0]
    batch = FakeBatch(3, 1000)
    rows = make(Scripted([], []), clock)
    assert rows.costs is not None
    batch.add("a", [1, 2])
    for _ in range(PLAIN_FIRST + 4):
        rows.propose(*batch.step({"a": [5]}))
        clock[0] += 1.0
    batch.add("b", [3] * 50)
    rows.propose(*batch.step({"a": [5]}))  # b's prompt is not through yet
    clock[0] += 100.0
    rows.propose(*batch.step({"a": [5], "b": []}))
    clock[0] += 100.0
    rows.propose(*batch.step({"a": [5], "b": [6]}))  # b is new
    assert rows.costs.seconds_by_size()[1] == pytest.approx(1.0, rel=0.05)


def test_a_draft_ends_before_an_id_that_the_model_cannot_embed() -> None:
    batch = FakeBatch(2, 1000)
    batch.add("a", [1, 2])
    rows = make(Scripted([7, 200, 7], [0.99, 0.98, 0.97]), [0.0])
    rows.costs = None
    assert rows.propose(*batch.step({"a": [5]})) == [[7]]
