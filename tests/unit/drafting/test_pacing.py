"""A costly source is asked while it pays, and never given up."""

from __future__ import annotations

import numpy as np

from retrieval_draft.drafting.pacing import FIRST_WAIT, LAST_WAIT, TRIAL, PacedSource, Pacer
from tests.support.sources import OracleSource


def run(pacer: Pacer, steps: int, with_it: tuple[int, float], without: tuple[int, float]) -> list[bool]:
    asked = []
    for _ in range(steps):
        asked.append(pacer.asks)
        pacer.note(*(with_it if pacer.asks else without))
    return asked


def test_both_are_tried_and_the_better_one_stays() -> None:
    asked = run(Pacer(), 400, (3, 0.1), (2, 0.1))
    assert asked[:TRIAL] == [True] * TRIAL
    assert asked[TRIAL : 2 * TRIAL] == [False] * TRIAL
    assert sum(asked) / len(asked) > 0.75


def test_a_loser_is_tried_ever_more_seldom_but_always_again() -> None:
    asked = run(Pacer(), 8 * LAST_WAIT, (3, 0.2), (2, 0.1))
    starts = [at for at in range(1, len(asked)) if asked[at] and not asked[at - 1]]
    waits = np.diff(starts)
    assert waits[0] <= 2 * (FIRST_WAIT + TRIAL)
    assert waits[-1] == LAST_WAIT + TRIAL
    assert np.all(np.diff(waits) >= 0)


def test_it_comes_back_when_it_pays_again() -> None:
    pacer = Pacer()
    run(pacer, 300, (3, 0.2), (2, 0.1))
    assert np.mean(run(pacer, 600, (6, 0.1), (2, 0.1))) > 0.5


def test_steps_are_timed_from_proposal_to_proposal() -> None:
    now = [0.0]
    source = PacedSource(OracleSource(list(range(50))), clock=lambda: now[0])
    session = source.open(np.array([1], np.int32))
    for _ in range(5):
        assert len(session.propose(4)) == 4
        session.observe(np.array([2, 3], np.int32))
        now[0] += 0.5
    np.testing.assert_allclose(source.pacer.rate(True), 4.0)
    assert source.pacer.rate(False) == 0
    for _ in range(TRIAL):
        last = session.propose(4)
        session.observe(np.array([2], np.int32))
        now[0] += 0.5
    assert len(last) == 0
