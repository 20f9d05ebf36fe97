from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from retrieval_draft.server.dashboard.feed import Feed
from retrieval_draft.server.dashboard.rates import Rates
from retrieval_draft.server.dashboard.tree_view import tree_view
from retrieval_draft.server.dashboard.watcher import Watcher
from retrieval_draft.server.errors import ApiError
from tests.support.engine_events import empty_plan, ended, report, row, started


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def watched() -> tuple[Watcher, Clock]:
    clock = Clock()
    return Watcher(lambda token: f"t{token}", clock), clock


def test_the_tree_has_texts_and_its_accepted_path() -> None:
    view = tree_view(row(), lambda token: f"t{token}")
    assert [node["text"] for node in view["nodes"]] == ["t8", "t9", "t4", "t3"]
    assert [node["parent"] for node in view["nodes"]] == [-1, 0, 1, 0]
    assert [node["accepted"] for node in view["nodes"]] == [True, True, True, False]
    assert view["nodes"][1]["sources"] == ["automaton", "history"]
    assert (view["accepted"], view["size"], view["bonus"]) == (2, 3, "t7")


def test_sums_are_of_all_and_texts_of_ones_own() -> None:
    watcher, _ = watched()
    watcher.queue_changed(4, 2)
    watcher.request_started(started("r", "a"))
    watcher.step(report(row(), row("q", (0,))))
    watcher.request_ended(ended())
    mine, theirs = watcher.snapshot("a"), watcher.snapshot("b")
    assert mine["tree"] is not None
    assert theirs["tree"] is None
    for seen in (mine, theirs):
        assert (seen["waiting"], seen["running"], seen["ended"]) == (4, 2, {"stop": 1})
        assert (seen["tokens"], seen["row_steps"], seen["drafted"], seen["accepted"]) == (4, 2, 6, 2)
        assert seen["by_source"] == [["automaton", 4, 1], ["history", 4, 2]]
        assert seen["by_level"] == [["request", 4, 1], ["history", 4, 2]]
        assert seen["seconds"]["forward"] == 0.09
        json.dumps(seen)


def test_rates_are_over_the_time_that_steps_took() -> None:
    rates = Rates()
    for second in (10.0, 10.5, 11.0):
        rates.add(second, report(row(), seconds=0.1, plain=0.08))
    found = rates.summary(40.0)
    assert found["tokens_per_second"] == pytest.approx(30.0)
    assert found["plain_tokens_per_second"] == pytest.approx(1 / 0.08)
    assert found["tokens_per_step"] == 3.0
    assert found["curve"] == [[-30, 30.0, 12.5], [-29, 30.0, 12.5]]
    plain = Rates()
    plain.add(1.0, report(type(row())("r", 0, empty_plan(), [0], [5]), plain=0.0))
    assert plain.summary(1.0)["plain_tokens_per_second"] is None
    assert Rates().summary(1.0)["tokens_per_second"] == 0.0


def test_reports_that_nobody_counts_do_not_pile_up() -> None:
    watcher, _ = watched()
    for number in range(10_000):
        watcher.request_started(started(str(number)))
        watcher.step(report(row(str(number))))
    assert len(watcher._waiting) <= 4096
    for number in range(10_000):
        watcher.request_started(started(str(number)))
        if not number % 1000:
            watcher.count()
    watcher.count()
    assert len(watcher._tenants) <= 4097


def test_ended_requests_leave_nothing() -> None:
    watcher, _ = watched()
    for number in range(100):
        watcher.request_started(started(f"r{number}"))
        watcher.request_ended(ended(f"r{number}"))
        watcher.count()
    assert not watcher._tenants


def test_a_feed_sends_the_latest_to_each_tenant() -> None:
    calls: list[str] = []
    over = threading.Event()

    def snapshot(tenant: str) -> dict[str, Any]:
        calls.append(tenant)
        return {"tenant": tenant, "number": len(calls)}

    async def run() -> None:
        feed = Feed(snapshot, over.is_set, seconds=0.01, most=2)
        feed.start()
        mine, leave = feed.subscribe("a")
        theirs, _ = feed.subscribe("b")
        with pytest.raises(ApiError, match="2 dashboards"):
            feed.subscribe("a")
        assert json.loads((await anext(mine))[6:])["tenant"] == "a"
        assert json.loads((await anext(theirs))[6:])["tenant"] == "b"
        await asyncio.sleep(0.3)  # a reader that sleeps misses what is old
        first = json.loads((await anext(mine))[6:])["number"]
        assert len(calls) - first < len(calls) - 3
        leave()
        assert len(feed) == 1
        over.set()
        assert [event async for event in theirs] == []
        feed.close()

    asyncio.run(run())


def test_a_snapshot_that_fails_does_not_end_the_feed() -> None:
    failing = [True]

    def snapshot(tenant: str) -> dict[str, Any]:
        if failing[0]:
            failing[0] = False
            raise RuntimeError("no")
        return {}

    async def run() -> None:
        feed = Feed(snapshot, lambda: False, seconds=0.01)
        feed.start()
        events, _ = feed.subscribe("a")
        assert await asyncio.wait_for(anext(events), 10) == b"data: {}\n\n"
        feed.close()

    asyncio.run(run())
