"""The queue: bounded, fair between tenants, first come, first served within one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.scheduler.queue import JobQueue
from tests.support.jobs import empty_job


def order(queue: JobQueue, free_rows: int = 8) -> list[str]:
    """Names of the jobs whose groups come next, until there are no more."""
    names = []
    while (group := queue.next(free_rows)) is not None:
        names.append(group.job.id)
    return names


def test_the_first_to_come_is_the_first_to_go_and_nobody_overtakes_it() -> None:
    queue = JobQueue(9)
    queue.put(empty_job("a", 2, 1))
    queue.put(empty_job("b", 1))
    assert queue.next(1) is None, "the first group does not fit"
    assert queue.waiting == 4
    assert order(queue, 2) == ["a", "a", "b"]
    assert queue.waiting == 0


def test_tenants_take_turns() -> None:
    queue = JobQueue(99)
    for name in ("x1", "x2", "x3", "y1", "z1", "z2"):
        queue.put(empty_job(name, 1, tenant=name[0]))
    assert order(queue) == ["x1", "y1", "z1", "x2", "z2", "x3"]


def test_more_choices_than_may_wait_are_refused_and_change_nothing() -> None:
    queue = JobQueue(5)
    queue.put(empty_job("a", 2, 2))
    with pytest.raises(ApiError, match="4 choices wait already; no more than 5") as full:
        queue.put(empty_job("b", 2))
    assert (full.value.status, full.value.headers()) == (429, {"Retry-After": "1"})
    queue.put(empty_job("c", 1))
    assert order(queue) == ["a", "a", "c"]


def test_one_tenant_cannot_fill_the_queue() -> None:
    queue = JobQueue(10, most=3)
    queue.put(empty_job("a", 2, tenant="x"))
    with pytest.raises(ApiError, match="2 choices of this tenant") as full:
        queue.put(empty_job("b", 2, tenant="x"))
    assert full.value.status == 429
    queue.put(empty_job("c", 3, tenant="y"))
    queue.put(empty_job("d", 1, tenant="x"))
    assert queue.waiting == 6


def test_a_dropped_job_leaves_with_all_that_waits_of_it() -> None:
    queue = JobQueue(9)
    first, second = empty_job("a", 2, 1), empty_job("b", 2)
    queue.put(first)
    queue.put(second)
    assert queue.jobs() == [first, second]
    queue.drop(first)
    queue.drop(empty_job("never put", 1, tenant="other"))
    assert (queue.jobs(), queue.waiting) == ([second], 2)
    queue.drop(second)
    assert (queue.jobs(), queue.waiting, queue.next(8)) == ([], 0, None)


def test_once_it_refuses_only_what_waits_goes_on() -> None:
    queue = JobQueue(9)
    queue.put(empty_job("a", 1))
    queue.refuse(ApiError(503, "stop"))
    with pytest.raises(ApiError, match="stop"):
        queue.put(empty_job("b", 1))
    assert order(queue) == ["a"]


def test_after_the_end_what_waits_is_still_handed_out() -> None:
    queue = JobQueue(9)
    queue.put(empty_job("a", 1))
    queue.end()
    assert queue.wait()
    assert order(queue) == ["a"]
    assert not queue.wait()


@pytest.mark.parametrize("what", ["put", "end"])
def test_the_engine_sleeps_until_something_comes_or_all_ends(what: str) -> None:
    queue, waits = JobQueue(9), threading.Event()

    def wait() -> bool:
        waits.set()
        return queue.wait()

    with ThreadPoolExecutor(1) as pool:
        woken = pool.submit(wait)
        assert waits.wait(10)
        assert not woken.done()
        if what == "put":
            queue.put(empty_job("a", 1))
        else:
            queue.end()
        assert woken.result(10) == (what == "put")


def test_the_lowest_priority_of_a_tenant_comes_first_and_of_equal_ones_the_first_that_came() -> None:
    queue = JobQueue(99)
    for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 0), ("e", 5), ("f", -1)):
        queue.put(empty_job(name, 1, 1, priority=priority))
    assert order(queue) == [each for name in "cfadbe" for each in (name, name)]


def test_no_priority_takes_the_turn_of_another_tenant() -> None:
    queue = JobQueue(99)
    for name in ("x1", "x2", "x3", "y1", "y2"):
        queue.put(empty_job(name, 1, tenant=name[0], priority=-100 if name[0] == "x" else 100))
    assert order(queue) == ["x1", "y1", "x2", "y2", "x3"]


def test_turns_are_by_tokens_of_prompts_and_replies() -> None:
    queue = JobQueue(99)
    for name in ("x1", "x2", "x3", "y1", "y2", "y3", "y4", "y5"):
        queue.put(empty_job(name, 1, tenant=name[0]))
    found = []
    while (group := queue.next(8)) is not None:
        found.append(group.job.id)
        queue.serve(group.job.tenant, 0, 10 if group.job.tenant == "x" else 4)
    assert found == ["x1", "y1", "y2", "y3", "x2", "y4", "y5", "x3"]


def test_one_that_comes_while_nobody_waits_has_saved_no_turns() -> None:
    queue = JobQueue(99)
    for number in range(50):  # one tenant alone, which never had to wait
        queue.put(empty_job(f"x{number}", 1, tenant="x"))
        assert len(order(queue)) == 1
        queue.serve("x", 0, 1)
    for name in ("y1", "y2", "y3", "y4", "y5", "y6", "x1"):
        queue.put(empty_job(name, 1, tenant=name[0]))
    assert order(queue).index("x1") < 4


def test_weights_are_shares() -> None:
    queue = JobQueue(99, weights={"x": 3.0})
    for number in range(12):
        for tenant in "xy":
            queue.put(empty_job(f"{tenant}{number}", 1, tenant=tenant))
    first = "".join(order(queue))[:24:2]
    assert (first.count("x"), first.count("y")) == (9, 3)


def test_one_that_comes_back_has_saved_no_turns() -> None:
    queue = JobQueue(99)
    for number in range(6):
        queue.put(empty_job(f"x{number}", 1, tenant="x"))
    for _ in range(3):
        assert queue.next(8) is not None
    for number in range(3):
        queue.put(empty_job(f"y{number}", 1, tenant="y"))
    assert order(queue) == ["x3", "y0", "x4", "y1", "x5", "y2"]


def test_one_that_does_not_fit_is_waited_for() -> None:
    queue = JobQueue(9)
    queue.put(empty_job("a", 1))
    queue.put(empty_job("b", 1))
    assert queue.next(8, lambda group: group.job.id == "b") is None
    assert order(queue) == ["a", "b"]
