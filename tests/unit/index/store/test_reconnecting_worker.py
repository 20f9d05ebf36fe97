"""A connection made again whenever it fails, and a thread that nothing but `stopped` ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError, ResponseError

from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.store.counts import StoreCounts
from retrieval_draft.index.store.health import Health
from retrieval_draft.index.store.reconnecting_worker import ReconnectingWorker, server_run


class Client:
    def __init__(self, answers: bool = True) -> None:
        self.answers, self.is_closed = answers, False

    def ping(self) -> None:
        if not self.answers:
            raise ConnectionError("no answer")

    def close(self) -> None:
        self.is_closed = True
        raise ConnectionError("even closing fails")


class Stopped(threading.Event):
    """Remembers how long it was waited for, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return self.is_set()


class Connecting:
    """A worker whose connector hands out given clients, or raises given errors, in turn."""

    def __init__(self, *results: Any) -> None:
        self.results: Iterator[Any] = iter(results)
        self.made: list[Client] = []
        self.blocks: list[float] = []
        self.stopped, self.counts, self.health = Stopped(), StoreCounts(), Health("redis://there")
        connector: Any = self
        self.worker = ReconnectingWorker(connector, "sending", 0.5, self.health, self.counts, self.stopped)

    def client(self, block: float) -> Client:
        self.blocks.append(block)
        found = next(self.results)
        if isinstance(found, Exception):
            raise found
        self.made.append(found)
        return found


def test_work_is_called_with_one_client_until_it_is_stopped() -> None:
    made, seen = Connecting(Client()), []

    def work(client: Any) -> None:
        seen.append(client)
        if len(seen) == 3:
            made.stopped.set()

    made.worker.run(work)
    assert seen == made.made * 3
    assert made.made[0].is_closed
    assert (made.blocks, made.counts.connections, made.counts.failures) == ([0.5], 1, 0)


def test_each_failure_closes_the_client_tells_of_it_and_makes_another() -> None:
    made, lost = Connecting(Client(), Client(), Client()), []

    def work(client: Any) -> None:
        if client is made.made[0] or (client is made.made[-1] and len(made.made) == 2):
            raise ConnectionError("gone")
        made.stopped.set()

    made.worker.run(work, lambda: lost.append(len(made.made)))
    assert lost == [1, 2]
    assert [client.is_closed for client in made.made] == [True, True, True]
    assert (made.counts.connections, made.counts.failures) == (3, 2)


def test_the_first_failure_is_no_outage_the_second_is() -> None:
    made, states = Connecting(ConnectionError("refused"), ConnectionError("refused"), Client()), []

    def work(client: Any) -> None:
        made.stopped.set()

    made.worker.run(work, lambda: states.append(made.health.state))
    assert states == ["connecting", "unreachable"]


def test_a_client_that_does_not_answer_is_not_worked_with() -> None:
    made, worked = Connecting(Client(answers=False), Client()), []

    def work(client: Any) -> None:
        worked.append(client)
        made.stopped.set()

    made.worker.run(work)
    assert worked == [made.made[1]]
    assert made.counts.connections == 1


def test_success_counts_failures_from_one_again() -> None:
    made, calls = Connecting(*(Client() for _ in range(4))), []

    def work(client: Any) -> None:
        calls.append(client)
        if len(made.made) == 4:
            made.stopped.set()
            return
        if len(made.made) == 3 and calls.count(client) == 1:
            made.worker.worked()
            return
        raise ConnectionError("gone")

    made.worker.run(work)
    assert len(made.stopped.waits) == 1, "not after the first failure, nor after the first since a success"


@pytest.mark.parametrize("error", [DatastoreError("full"), OSError("no file"), ResponseError("OOM")])
def test_what_a_store_raises_is_no_defect(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    made = Connecting(error, Client())
    made.worker.run(lambda client: made.stopped.set())
    assert made.counts.failures == 1
    assert caplog.text == ""


def test_a_defect_of_ours_is_logged_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    made = Connecting(Client(), Client())

    def work(client: Any) -> None:
        if client is made.made[0]:
            raise KeyError("ours")
        made.stopped.set()

    made.worker.run(work)
    assert len(made.made) == 2
    assert "goes on after an error: KeyError('ours')" in caplog.text


def test_nothing_is_connected_once_it_is_stopped() -> None:
    made = Connecting()
    made.stopped.set()
    made.worker.run(lambda client: None)
    assert made.blocks == []


class Info:
    def __init__(self, found: dict[str, str] | Exception) -> None:
        self.found = found

    def info(self, section: str) -> dict[str, str]:
        assert section == "server"
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_which_redis_it_is() -> None:
    assert server_run(Info({"run_id": "ab"}), False) == "ab"
    assert server_run(Info(ResponseError("not permitted")), False) is None
    assert server_run(Info({"run_id": "ab"}), True) is None  # of a cluster there are many
    with pytest.raises(ConnectionError):
        server_run(Info(ConnectionError("gone")), False)


def test_waits_double_up_to_two_seconds_with_jitter_through_a_long_outage() -> None:
    failures = 5000
    made = Connecting(*[ConnectionError("refused")] * failures, Client())
    made.worker.run(lambda client: made.stopped.set())
    waits = made.stopped.waits
    assert len(waits) == failures - 1, "none after the first"
    for failure, wait in enumerate(waits, 2):
        longest = min(2.0, 0.05 * 2.0 ** min(failure, 16))
        assert longest / 2 <= wait <= longest
    assert len({*waits[-50:]}) > 40
