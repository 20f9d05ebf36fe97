"""One tenant's calls wait for each other, and for nobody else's."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from retrieval_draft.http.fair_pool import FairPool


@pytest.fixture
def pool() -> Iterator[FairPool]:
    made = FairPool(4, "test")
    yield made
    made.close()


def test_lanes_do_not_wait_for_each_other(pool: FairPool) -> None:
    go, order = threading.Event(), []
    slow = [pool.submit("a", lambda: go.wait(10)) for _ in range(20)]
    assert pool.submit("b", lambda: order.append("b") or 7).result(5) == 7
    assert not slow[1].running()  # one of a lane at a time
    go.set()
    assert all(each.result(10) for each in slow)


def test_lanes_take_turns_where_threads_are_few() -> None:
    pool, go, order = FairPool(1, "test"), threading.Event(), []
    first = pool.submit("a", lambda: go.wait(10))
    rest = [pool.submit(lane, lambda lane=lane: order.append(lane)) for lane in "aaaabc"]
    go.set()
    for each in (first, *rest):
        each.result(10)
    assert order[:3] in (["b", "c", "a"], ["a", "b", "c"], ["b", "a", "c"])
    pool.close()


def test_what_is_cancelled_is_dropped_at_once(pool: FairPool) -> None:
    class Body:
        """Something large."""

    go = threading.Event()
    running = pool.submit("a", lambda: go.wait(10))
    body = Body()
    held = weakref.ref(body)
    waiting = pool.submit("a", lambda body=body: body)
    del body
    assert waiting.cancel()
    del waiting
    gc.collect()
    assert held() is None  # while the first still runs
    go.set()
    assert running.result(10)


def test_errors_reach_who_asked_and_end_no_lane(pool: FairPool) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        pool.submit("a", fail).result(5)
    assert pool.submit("a", lambda: 1).result(5) == 1


def test_nothing_runs_after_the_end() -> None:
    pool, go = FairPool(1, "test"), threading.Event()
    pool.submit("a", lambda: go.wait(10))
    waiting = pool.submit("a", lambda: 1)
    pool.close()
    go.set()
    with pytest.raises(CancelledError):
        waiting.result(5)
