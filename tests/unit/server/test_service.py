"""The service: what it says of itself, what it takes, and how it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.http.keys import KeyRing
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.generation_request import GenerationFields
from retrieval_draft.server.openai.prepare import prepare_request
from retrieval_draft.server.scheduler.channel import Failed
from retrieval_draft.server.scheduler.job import Job
from retrieval_draft.server.service import Loaded, Service
from retrieval_draft.server.settings import ServerSettings
from tests.support.jobs import ended
from tests.support.servers import tiny_drafter, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(TOKENIZER)


def load() -> tuple[RetrievalDrafter, Any]:
    return tiny_drafter(MODEL, TOKENIZER), TOKENIZER


def broken() -> tuple[RetrievalDrafter, Any]:
    raise OSError("no such folder")


@contextmanager
def started(
    made: Callable[[], tuple[RetrievalDrafter, Any]] = load,
    keys: dict[str, str] | None = None,
    **settings: Any,
) -> Iterator[Service]:
    service = Service(ServerSettings("tiny", **settings), made, keys=KeyRing(keys or {}))
    service.start()
    try:
        yield service
    finally:
        service.close()


def prepare(job: Job, loaded: Loaded) -> None:
    prepare_request(job, GenerationFields(temperature=0.0), loaded, [[1, 2]], 4)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def test_it_is_loading_until_it_is_loaded() -> None:
    held = threading.Event()

    def slow() -> tuple[RetrievalDrafter, Any]:
        assert held.wait(60)
        return load()

    with started(slow) as service:
        assert service.health() == (503, {"status": "loading", "model": "tiny"})
        with pytest.raises(ApiError, match="still being loaded") as early:
            service.loaded  # noqa: B018  (reading it raises)
        assert early.value.headers() == {"Retry-After": "5"}
        assert (service.is_ready, service.is_idle) == (False, True)
        held.set()
        service.wait(60)
        assert service.is_ready
        assert service.health() == (200, {"status": "ok", "model": "tiny", "running": 0, "waiting": 0})


def test_a_model_that_cannot_be_loaded_is_said_and_not_tried_again() -> None:
    with started(broken) as service:
        with pytest.raises(OSError, match="no such folder"):
            service.wait(60)
        service.start()
        assert service.health() == (503, {"status": "failed", "model": "tiny"})
        with pytest.raises(ApiError, match="could not be loaded") as failed:
            service.loaded  # noqa: B018  (reading it raises)
        assert failed.value.headers() == {}, "trying again does not help"


def test_those_who_wait_for_the_model_are_told_before_anybody_is_served() -> None:
    ready: list[bool] = []
    service = Service(ServerSettings("tiny"), load)
    service.when_loaded.append(lambda loaded: ready.append(service.is_ready))
    service.start()
    try:
        service.wait(60)
        assert ready == [False]
    finally:
        service.close()


def test_a_request_is_prepared_beside_the_loop_and_decoded() -> None:
    async def check() -> None:
        threads: list[str] = []

        def noted(job: Job, loaded: Loaded) -> None:
            threads.append(threading.current_thread().name)
            prepare(job, loaded)

        with started() as service:
            service.wait(60)
            job = await service.submit("id", "default", noted, "00-trace", "mine")
            events = await ended(job)
        assert not isinstance(events[-1], Failed)
        assert len(job.replies) == 1
        assert (job.id, job.tenant, job.traceparent, job.client_id) == ("id", "default", "00-trace", "mine")
        assert threads[0].startswith("retrieval-draft-prepare")

    run(check)


def test_what_preparing_raises_comes_out() -> None:
    async def check() -> None:
        def refuse(job: Job, loaded: Loaded) -> None:
            raise ApiError(400, "no such thing")

        with started() as service:
            service.wait(60)
            with pytest.raises(ApiError, match="no such thing"):
                await service.submit("id", "default", refuse)
            assert service.is_idle

    run(check)


def test_preparing_ends_once_nobody_waits_for_it() -> None:
    async def check() -> None:
        begun, gone, noted, found = threading.Event(), threading.Event(), threading.Event(), []

        def slow(job: Job, loaded: Loaded) -> None:
            begun.set()
            assert gone.wait(60)
            try:
                loaded.check()
            except ApiError as error:
                found.append(error.status)
                raise
            finally:
                noted.set()
            prepare(job, loaded)

        with started() as service:
            service.wait(60)
            waiting = asyncio.ensure_future(service.submit("id", "default", slow))
            assert await asyncio.to_thread(begun.wait, 60)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            gone.set()
            assert await asyncio.to_thread(noted.wait, 60)
        assert found == [499]

    run(check)


def test_each_tenant_has_a_drafter_of_its_own() -> None:
    async def check() -> None:
        seen: list[RetrievalDrafter] = []

        def noted(job: Job, loaded: Loaded) -> None:
            seen.append(loaded.drafter)
            prepare(job, loaded)

        with started(keys={"secret-a": "a", "secret-b": "b"}) as service:
            service.wait(60)
            for tenant in ("a", "b", "a"):
                job = await service.submit(tenant, tenant, noted)
                assert job.drafter is seen[-1]
                await ended(job)
        assert seen[0] is seen[2]
        assert seen[0] is not seen[1]

    run(check)


def test_about_to_stop_it_takes_nothing_and_says_so() -> None:
    async def check() -> None:
        with started() as service:
            service.wait(60)
            service.drain()
            with pytest.raises(ApiError, match="about to stop") as late:
                await service.submit("id", "default", prepare)
            assert (late.value.status, late.value.headers()) == (503, {"Retry-After": "5"})
            status, body = service.health()
            assert (status, body["status"]) == (503, "draining")

    run(check)


def test_who_has_left_is_given_up_and_hears_nothing() -> None:
    async def check() -> None:
        with started() as service:
            service.wait(60)
            job = await service.submit("id", "default", prepare)
            service.leave(job)
            assert job.given_up is not None
            assert job.given_up.status == 499
            assert await asyncio.to_thread(service.loaded.engine.stop, 60)
            assert service.is_idle
            job.channel.put([Failed(ApiError(500, "later"))])
            job.channel._ready.set()
            assert await job.channel.get() == []

    run(check)


@pytest.mark.parametrize(
    ("keys", "share"), [({}, 1.0), ({"secret-d": "default"}, 1.0), ({"secret-a": "a", "secret-b": "b"}, 0.5)]
)
def test_one_tenant_may_not_take_all_places_where_there_are_others(
    keys: dict[str, str], share: float
) -> None:
    service = Service(ServerSettings("tiny", max_queue=64, max_batch=4), load, keys=KeyRing(keys))
    assert service.choices_limit == 100
    assert service.tenant_limit == 100 * share


def test_a_stuck_engine_is_no_longer_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    with started() as service:
        service.wait(60)
        monkeypatch.setattr(type(service.loaded.engine), "is_stuck", property(lambda engine: True))
        status, body = service.health()
        assert (status, body["status"]) == (503, "stuck")


class Store:
    def __init__(self, state: str) -> None:
        self.health = self
        self.state = state


@pytest.mark.parametrize(("state", "status"), [("connected", "ok"), ("unreachable", "degraded")])
def test_a_store_that_is_away_costs_speed_and_no_health(
    state: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started() as service:
        monkeypatch.setattr(service.wait(60).drafter, "store", Store(state))
        code, body = service.health()
        monkeypatch.undo()
    assert (code, body["status"], body["store"]) == (200, status, state)


def test_closing_ends_the_engine_and_its_drafters(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[RetrievalDrafter] = []
    whole = RetrievalDrafter.close
    monkeypatch.setattr(
        RetrievalDrafter, "close", lambda drafter: (closed.append(drafter), whole(drafter))[1]
    )
    with started() as service:
        loaded = service.wait(60)
    assert closed == [loaded.drafter]
    assert not loaded.engine._thread.is_alive()


def test_one_that_never_loaded_closes() -> None:
    Service(ServerSettings("tiny"), load).close()
