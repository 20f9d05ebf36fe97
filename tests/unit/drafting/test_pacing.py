"""A costly source is asked in the steps in which it pays, and never given up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.drafting import pacing
from retrieval_draft.drafting.cost import CostModel
from retrieval_draft.drafting.pacing import LAST_WAIT, SHARE, PacedSource, Pacer
from retrieval_draft.engine.draft_models.model_draft import ModelDraft
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import make
from tests.support.sources import OracleSource


class Loop:
    """Steps of a second and 20 tokens, in which a source takes `price` seconds and adds `gain` tokens."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pacer = Pacer(lambda: self.now)

    def step(self, expected: float, price: float, gain: int) -> bool:
        asked = self.pacer.asks(expected)
        tokens = 20
        if asked:
            self.now += price
            self.pacer.took(price)
            self.pacer.added(expected, gain)
            tokens += gain
        self.pacer.emitted(tokens)
        self.now += 1.0
        return asked


def test_it_sleeps_in_the_steps_in_which_the_others_are_certain() -> None:
    """12 tokens more where the others expect nothing, none in a long copy; a call takes the time of 4."""
    loop = Loop()
    asked: dict[float, list[bool]] = {0.1: [], 9.0: []}
    for at in range(600):
        expected = 9.0 if at // 20 % 2 else 0.1
        asked[expected].append(loop.step(expected, 0.2, 0 if expected > 1 else 12))
    assert np.mean(asked[0.1]) > 0.95
    assert np.mean(asked[9.0]) < 0.2


def test_a_loser_is_tried_ever_more_seldom_but_always_again() -> None:
    loop = Loop()
    asked = [loop.step(1.0, 0.5, 0) for _ in range(8 * LAST_WAIT)]
    tries = np.flatnonzero(asked)
    assert tries[:2].tolist() == [0, 1]  # the first one loads code: it is no measure, and no loss
    assert np.all(np.diff(np.diff(tries)) >= -1)  # by the time lost at first: 99 steps, or 100
    assert np.diff(tries)[-1] == LAST_WAIT
    assert (len(tries) - 1) * 0.5 <= SHARE * loop.now + 1


def test_what_pays_is_asked_from_the_first_step_on() -> None:
    loop = Loop()
    assert all(loop.step(1.0, 0.2, 12) for _ in range(100))


def test_what_does_not_pay_loses_little_before_that_is_known() -> None:
    """A call takes the time of two steps and adds nothing."""
    loop = Loop()
    asked = sum(loop.step(1.0, 2.0, 0) for _ in range(100))
    assert asked == 2


def test_trials_of_a_dear_source_lose_a_small_share_of_the_time() -> None:
    loop = Loop()
    steps = 5000
    asked = sum(loop.step(float(at % 9), 8.0, 0) for at in range(steps))
    assert asked > 2
    assert (asked - 2) * 8.0 <= SHARE * loop.now


def test_it_comes_back_when_it_pays_again() -> None:
    loop = Loop()
    for _ in range(300):
        loop.step(1.0, 0.5, 0)
    assert np.mean([loop.step(1.0, 0.5, 40) for _ in range(600)]) > 0.5


def test_the_first_call_of_a_request_is_not_the_price() -> None:
    loop = Loop()
    for at in range(40):
        loop.step(1.0, 30.0 if at % 20 == 0 else 0.1, 10)
    assert loop.pacer.price == pytest.approx(0.1)


def test_a_longer_pass_is_a_part_of_the_price() -> None:
    pacer = Pacer(lambda: 0.0)
    pacer.lengthened(5.0)  # of no call
    for _ in range(3):
        pacer.asks(0.0)
        pacer.took(1.0)
        pacer.lengthened(0.25)
    assert pacer.price == 1.25


def test_the_price_in_a_batch_is_each_ones_share() -> None:
    """One call drafts for four requests, whose own calls take no time."""

    class Joint(OracleSource):
        def open(self, prompt: Any, references: Any = ()) -> Any:
            session = super().open(prompt, references)
            session.draft_seconds = 0.05
            return session

    source = PacedSource(Joint(list(range(50))), clock=lambda: 0.0)
    session: Any = source.open(np.array([1], np.int32))
    session.propose(4)
    assert source.pacer.price == pytest.approx(0.05)


def test_a_source_that_refuses_a_prompt_is_not_running() -> None:
    class Refusing(OracleSource):
        def open(self, prompt: Any, references: Any = ()) -> Any:
            if len(prompt) > 1:
                raise ValueError("unknown token")
            return super().open(prompt, references)

    source = PacedSource(Refusing(list(range(50))), clock=lambda: 0.0)
    with pytest.raises(ValueError, match="unknown"):
        source.open(np.array([1, 2], np.int32))
    session: Any = source.open(np.array([1], np.int32))
    session.pacer.asks(0.0)
    session.close()
    assert source.pacer._last is None


def test_time_between_requests_does_not_count() -> None:
    now = [0.0]
    source = PacedSource(OracleSource(list(range(50))), clock=lambda: now[0])
    for _ in range(3):
        session: Any = source.open(np.array([1], np.int32))
        for _ in range(5):
            session.pacer.asks(0.0)
            session.observe(np.array([2, 3], np.int32))
            now[0] += 0.5
        session.close()
        now[0] += 1000.0
    # Four steps of each request have an end.
    assert source.pacer.rate == pytest.approx(30 / (3 * 4 * 0.5), rel=0.1)


@pytest.mark.parametrize("kind", ["useless", "right"])
def test_a_draft_model_is_asked_where_it_adds_tokens(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is left out: a call costs half a token, which lucky guesses do not bring."""
    model = make("llama")
    draft = ModelDraft(make("llama") if kind == "right" else make("gemma3", seed=9), 97)
    monkeypatch.setattr(Pacer, "price", 1.0)
    monkeypatch.setattr(Pacer, "rate", 0.5)
    monkeypatch.setattr(pacing, "SHARE", math.inf)
    monkeypatch.setattr(CostModel, "choose", lambda self, path_probs, *_, **__: min(len(path_probs), 12))
    monkeypatch.setattr(CostModel, "best", CostModel.choose)
    ours = RetrievalDrafter.for_model(model, draft_model=draft, config=DraftConfig(nodes=None))
    (source,) = [each for each in ours.draft_engine.sources if isinstance(each, PacedSource)]
    stock = model.generate(prompt_ids(), max_new_tokens=100, do_sample=False)
    assert near_ties(model, ours.generate(prompt_ids(), max_new_tokens=100, do_sample=False), stock) == 0
    assert ours.stats.source_failures == 0
    asked = source.pacer.calls / ours.stats.steps
    assert asked > 0.6 if kind == "right" else asked < 0.4
