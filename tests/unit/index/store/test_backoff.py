"""Waits before another try."""

from __future__ import annotations

from typing import Any

import pytest

from retrieval_draft.index.store import backoff as backoff_module
from retrieval_draft.index.store.backoff import Backoff


class Stopped:
    """Notes the seconds that were to be waited, and waits none."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return False


def waited(backoff: Backoff, failures: int) -> list[float]:
    stopped: Any = Stopped()
    for _ in range(failures):
        backoff.wait(stopped)
    found: list[float] = stopped.waits
    return found


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module.random, "uniform", lambda low, high: high)


@pytest.mark.usefixtures("longest")
def test_waits_double_up_to_the_longest_and_the_first_failure_costs_none() -> None:
    assert waited(Backoff(first=0.05, most=1.0), 7) == [0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


@pytest.mark.usefixtures("longest")
def test_after_a_success_the_first_failure_is_tried_again_at_once() -> None:
    backoff = Backoff(first=0.05, most=1.0)
    assert waited(backoff, 4) == [0.2, 0.4, 0.8]
    backoff.reset()
    assert waited(backoff, 2) == [0.2]


@pytest.mark.usefixtures("longest")
def test_a_long_outage_overflows_nothing() -> None:
    assert waited(Backoff(), 5000)[-1] == 2.0


def test_servers_do_not_come_back_all_at_once() -> None:
    waits = [waited(Backoff(first=0.05, most=1.0), 9)[-1] for _ in range(50)]
    assert all(0.5 <= wait <= 1.0 for wait in waits)
    assert len(set(waits)) > 40
