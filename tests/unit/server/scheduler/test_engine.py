"""The thread that decodes: whom it serves, whom it gives up, and that nothing ends it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine.cache.footprint import CacheFootprint
from retrieval_draft.engine.decode import Batch
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.detokenize import ReplyText
from retrieval_draft.server.scheduler.channel import Ended, Event, Failed, Tokens
from retrieval_draft.server.scheduler.engine import ServingEngine
from retrieval_draft.server.settings import ServerSettings
from tests.support.drafters import prompt_ids
from tests.support.jobs import ended, job_of
from tests.support.models import make
from tests.support.stores import wait_until

CONFIG = DraftConfig(method="prompt_lookup", nodes=4)


class Gate:
    """Holds the passes of a model up where a test wants that."""

    def __init__(self, model: Any) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.open.set()
        model.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        if not self.open.is_set():
            self.reached.set()
        assert self.open.wait(60)


MODEL = make("llama")
GATE = Gate(MODEL)
DRAFTER = RetrievalDrafter.for_model(MODEL, method="prompt_lookup", config=CONFIG)


class Ends:
    """Notes starts and ends."""

    def __init__(self) -> None:
        self.starts: list[str] = []
        self.ends: list[tuple[str, str]] = []

    def queue_changed(self, waiting: int, running: int) -> None: ...

    def step(self, report: Any) -> None: ...

    def request_started(self, start: Any) -> None:
        self.starts.append(start.request_id)

    def request_ended(self, end: Any) -> None:
        self.ends.append((end.request_id, end.reason))


@contextmanager
def serving(**settings: Any) -> Iterator[tuple[ServingEngine, Ends]]:
    ends = Ends()
    engine = ServingEngine(DRAFTER, ServerSettings("m", **settings), [ends])
    engine.start()
    try:
        yield engine, ends
    finally:
        GATE.open.set()
        assert engine.stop(60)
    assert (engine.running, engine.waiting) == (0, 0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))


def tokens_of(events: list[Event], index: int = 0) -> list[int]:
    """Tokens of one choice."""
    found = [each for each in events if isinstance(each, Tokens) and each.index == index]
    return [token for each in found for token in each.tokens]


def ends_of(events: list[Event]) -> dict[int, str]:
    return {each.index: each.reason for each in events if isinstance(each, Ended)}


def failure(events: list[Event]) -> ApiError:
    assert isinstance(events[-1], Failed)
    return events[-1].error


def alone(prompt: torch.Tensor, **options: Any) -> list[int]:
    out = MODEL.generate(prompt, **{"do_sample": False, "max_new_tokens": 8, **options})
    reply: list[int] = out[0, prompt.shape[1] :].tolist()
    return reply


async def held(engine: ServingEngine, job: Any) -> None:
    """Submits a job, and stops the model in the middle of its prompt."""
    GATE.reached.clear()
    GATE.open.clear()
    engine.submit(job)
    assert await asyncio.to_thread(GATE.reached.wait, 60)


def test_a_job_is_told_its_tokens_and_its_end() -> None:
    async def check() -> None:
        with serving() as (engine, ends):
            job = job_of(DRAFTER, prompt_ids(9))
            engine.submit(job)
            events = await ended(job)
        assert tokens_of(events) == alone(prompt_ids(9))
        assert ends_of(events) == {0: "length"}
        assert (ends.starts, ends.ends) == (["job"], [("job", "length")])
        assert (job.ended, job.size, job.choices) == (1, 1, []), "they would know the job, and it them"

    run(check)


def test_the_model_s_end_token_is_a_stop() -> None:
    async def check() -> None:
        reply = alone(prompt_ids(9))
        with serving() as (engine, _):
            job = job_of(DRAFTER, prompt_ids(9), eos_token_id=reply[3])
            engine.submit(job)
            events = await ended(job)
        assert tokens_of(events) == reply[: reply.index(reply[3]) + 1]
        assert ends_of(events) == {0: "stop"}

    run(check)


def test_jobs_in_company_say_what_they_say_alone() -> None:
    async def check() -> None:
        with serving(max_batch=2) as (engine, _):
            jobs = [job_of(DRAFTER, prompt_ids(7 + number, seed=number), f"{number}") for number in range(4)]
            for job in jobs:
                engine.submit(job)
            found = [tokens_of(await ended(job)) for job in jobs]
        assert found == [alone(prompt_ids(7 + number, seed=number)) for number in range(4)]

    run(check)


def test_samples_of_a_prompt_are_choices_of_their_own() -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "seed": 5, "top_k": 0}

    async def check() -> None:
        with serving() as (engine, _):
            job = job_of(DRAFTER, prompt_ids(9), **options)
            engine.submit(job)
            events = await ended(job)
        out = DRAFTER.generate(prompt_ids(9), max_new_tokens=8, **options)
        assert [tokens_of(events, index) for index in range(3)] == out[:, 9:].tolist()
        assert ends_of(events) == dict.fromkeys(range(3), "length")

    run(check)


def test_more_samples_than_rows_are_refused() -> None:
    async def check() -> None:
        with serving(max_batch=2) as (engine, _):
            job = job_of(DRAFTER, prompt_ids(9), do_sample=True, num_return_sequences=3)
            with pytest.raises(ApiError, match="3 samples needs as many rows; this server decodes 2") as wide:
                engine.submit(job)
        assert (wide.value.status, wide.value.param) == (400, "n")

    run(check)


def test_one_that_waits_can_be_given_up_and_never_starts() -> None:
    async def check() -> None:
        with serving(max_batch=1) as (engine, ends):
            first, second = job_of(DRAFTER, prompt_ids(9), "a"), job_of(DRAFTER, prompt_ids(9), "b")
            await held(engine, first)
            engine.submit(second)
            assert (engine.running, engine.waiting) == (1, 1)
            engine.give_up(second, ApiError(499, "gone"))
            engine.give_up(second, ApiError(500, "a later reason"))
            GATE.open.set()
            assert failure(await ended(second)).message == "gone"
            assert tokens_of(await ended(first)) == alone(prompt_ids(9))
        assert ends.starts == ["a"]
        assert ends.ends == [("b", "abort"), ("a", "length")]

    run(check)


def test_one_that_runs_can_be_given_up_and_the_others_go_on() -> None:
    async def check() -> None:
        with serving() as (engine, ends):
            first = job_of(DRAFTER, prompt_ids(9), "a", max_new_tokens=400)
            second = job_of(DRAFTER, prompt_ids(12), "b")
            engine.submit(first)
            assert isinstance((await first.channel.get())[0], Tokens)
            await held(engine, second)
            engine.give_up(first, ApiError(499, "gone"))
            GATE.open.set()
            assert failure(await ended(first)).message == "gone"
            assert tokens_of(await ended(second)) == alone(prompt_ids(12))
        assert ends.ends == [("a", "abort"), ("b", "length")]

    run(check)


def test_what_is_over_cannot_be_given_up() -> None:
    async def check() -> None:
        with serving() as (engine, ends):
            job = job_of(DRAFTER, prompt_ids(9))
            engine.submit(job)
            await ended(job)
            engine.give_up(job, ApiError(499, "gone"))
            other = job_of(DRAFTER, prompt_ids(9), "other")
            engine.submit(other)
            await ended(other)
        assert ends.ends == [("job", "length"), ("other", "length")]

    run(check)


def test_out_of_time_is_a_504() -> None:
    async def check() -> None:
        with serving() as (engine, ends):
            job = job_of(DRAFTER, prompt_ids(9), seconds=0.0)
            engine.submit(job)
            error = failure(await ended(job))
        assert (error.status, error.message) == (504, "The request took longer than 0 s.")
        assert ends.ends == [("job", "abort")]

    run(check)


class Broken:
    """A processor that raises in the middle of a reply."""

    def __init__(self) -> None:
        self.left = 3

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise RuntimeError("secret")
        return scores


def test_a_request_whose_own_processor_raises_fails_alone() -> None:
    async def check() -> None:
        with serving() as (engine, ends):
            bad = job_of(DRAFTER, prompt_ids(9), "bad", logits_processor=[Broken()])
            good = job_of(DRAFTER, prompt_ids(12), "good")
            for job in (bad, good):
                engine.submit(job)
            error = failure(await ended(bad))
            assert tokens_of(await ended(good)) == alone(prompt_ids(12))
        assert error.status == 500
        assert "secret" not in error.message
        assert sorted(ends.ends) == [("bad", "error"), ("good", "length")]

    run(check)


class BrokenOnce(Broken):
    """Raises for one of three rows that share it, in their first step."""

    def __init__(self) -> None:
        self.left = 5

    def __deepcopy__(self, memo: Any) -> BrokenOnce:
        return self


def test_an_error_of_one_choice_ends_all_of_its_request_and_is_told_once() -> None:
    async def check() -> None:
        with serving() as (engine, ends):
            bad = job_of(
                DRAFTER, prompt_ids(9), "bad", do_sample=True, num_return_sequences=3,
                logits_processor=[BrokenOnce()],
            )  # fmt: skip
            engine.submit(bad)
            assert failure(await ended(bad)).status == 500
            await asyncio.to_thread(wait_until, lambda: engine.running == 0)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(bad.channel.get(), 0.1)
        assert ends.ends == [("bad", "error")] * 3

    run(check)


def test_a_request_whose_sources_cannot_be_opened_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        whole = type(DRAFTER.continuous).open

        def broken(continuous: Any, prepared: Any, stats: Any) -> Any:
            if len(prepared.requests[0].prompt) == 9:
                raise OSError("broken on purpose")
            return whole(continuous, prepared, stats)

        monkeypatch.setattr(type(DRAFTER.continuous), "open", broken)
        with serving() as (engine, ends):
            bad, good = job_of(DRAFTER, prompt_ids(9), "bad"), job_of(DRAFTER, prompt_ids(12), "good")
            for job in (bad, good):
                engine.submit(job)
            assert failure(await ended(bad)).status == 500
            assert tokens_of(await ended(good)) == alone(prompt_ids(12))
        assert sorted(ends.ends) == [("bad", "error"), ("good", "length")]

    run(check)


def test_a_batch_that_breaks_fails_its_requests_and_the_next_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def check() -> None:
        whole, left = ServingEngine._turn, [2]

        def broken(engine: ServingEngine) -> None:
            left[0] -= 1
            if not left[0]:
                raise MemoryError("broken on purpose")
            whole(engine)

        monkeypatch.setattr(ServingEngine, "_turn", broken)
        with serving() as (engine, ends):
            first = job_of(DRAFTER, prompt_ids(9), "a")
            engine.submit(first)
            assert failure(await ended(first)).status == 500
            second = job_of(DRAFTER, prompt_ids(9), "b")
            engine.submit(second)
            assert tokens_of(await ended(second)) == alone(prompt_ids(9))
        assert ends.ends == [("a", "error"), ("b", "length")]

    run(check)


def test_about_to_stop_it_takes_no_more_and_ends_what_it_has() -> None:
    async def check() -> None:
        with serving() as (engine, _):
            job = job_of(DRAFTER, prompt_ids(9))
            await held(engine, job)
            engine.refuse()
            with pytest.raises(ApiError, match="about to stop") as late:
                engine.submit(job_of(DRAFTER, prompt_ids(9)))
            assert (late.value.status, late.value.headers()) == (503, {"Retry-After": "5"})
            GATE.open.set()
            assert tokens_of(await ended(job)) == alone(prompt_ids(9))

    run(check)


def test_all_can_be_given_up_those_that_wait_too() -> None:
    async def check() -> None:
        with serving(max_batch=1) as (engine, _):
            jobs = [job_of(DRAFTER, prompt_ids(9), name) for name in "abc"]
            await held(engine, jobs[0])
            for job in jobs[1:]:
                engine.submit(job)
            engine.give_up_all(ApiError(503, "The server stops."))
            GATE.open.set()
            assert [failure(await ended(job)).message for job in jobs] == ["The server stops."] * 3

    run(check)


def test_an_engine_that_never_started_stops() -> None:
    assert ServingEngine(DRAFTER, ServerSettings("m")).stop(1)


def test_a_pass_that_takes_longer_than_it_may_is_seen() -> None:
    async def check() -> None:
        with serving(stuck_seconds=0.05) as (engine, _):
            assert not engine.is_stuck
            job = job_of(DRAFTER, prompt_ids(9))
            await held(engine, job)
            await asyncio.to_thread(wait_until, lambda: engine.is_stuck)
            GATE.open.set()
            await ended(job)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(wait_until, lambda: not engine.is_stuck)  # it only has nothing to do

    run(check)


def test_stop_strings_cut_the_text_and_end_the_row() -> None:
    async def check() -> None:
        reply = alone(prompt_ids(9))

        def decode(tokens: Any) -> str:
            return "".join(f"<{token}>" for token in tokens)

        text = ReplyText(decode, stops=[decode(reply[2:4])])
        with serving() as (engine, _):
            job = job_of(DRAFTER, prompt_ids(9), text=text)
            engine.submit(job)
            events = await ended(job)
        assert ends_of(events) == {0: "stop"}
        assert tokens_of(events) == reply[:4]
        shown = [piece for each in events if isinstance(each, Tokens) for piece in each.pieces or ()]
        (end,) = [each for each in events if isinstance(each, Ended)]
        assert "".join(shown) + str(end.rest) == decode(reply[:2])

    run(check)


def test_counts_go_to_the_drafter_that_was_used() -> None:
    async def check() -> None:
        other = DRAFTER.namespace("other", 1 << 20)
        before = DRAFTER.stats.requests
        with serving() as (engine, _):
            job = job_of(other, prompt_ids(9))
            engine.submit(job)
            events = await ended(job)
        (end,) = [each for each in events if isinstance(each, Ended)]
        assert (other.stats.requests, other.stats.tokens) == (1, 8)
        assert DRAFTER.stats.requests == before
        assert end.stats.tokens == 8

    run(check)


def test_what_does_not_fit_into_the_memory_of_caches_waits_or_is_refused() -> None:
    prompt = prompt_ids(20)
    each = CacheFootprint(DRAFTER.target).bytes(20 + 8 + 64)

    async def test() -> None:
        most = 0
        with serving(max_cache_bytes=int(each * 2.2)) as (engine, _):
            with pytest.raises(ApiError, match="bytes of cache"):
                engine.submit(job_of(DRAFTER, prompt, max_new_tokens=490))
            jobs = [job_of(DRAFTER, prompt, str(number)) for number in range(5)]
            GATE.open.clear()
            for job in jobs:
                engine.submit(job)
            assert await asyncio.to_thread(GATE.reached.wait, 60)
            most = max(most, engine.running)
            GATE.open.set()
            told = await asyncio.gather(*map(ended, jobs))
        assert most <= 2
        assert all(any(isinstance(event, Ended) for event in events) for events in told)

    run(test)


@pytest.mark.parametrize("share", [1.1, 4.0])
@pytest.mark.parametrize("exact", [None, "bitwise"])
def test_memory_of_passes_counts_among_that_of_caches(exact: Any, share: float) -> None:
    """Requests of two rows; what all rows and the passes' memory take together never exceeds the limit."""
    drafter = RetrievalDrafter.for_model(
        make("llama", max_position_embeddings=4096),
        method="prompt_lookup",
        config=DraftConfig(method="prompt_lookup", nodes=4, graphs="tape", exact=exact),
    )
    graphs, memory, prompt = drafter.target.graphs, drafter.target.pass_memory, prompt_ids(20)
    assert memory is not None
    with torch.no_grad():
        footprint = CacheFootprint(drafter.target)
    most = int(share * 2 * max(footprint.bytes(20 + 60 + 64), footprint.bytes(512)))
    taken, step = [], Batch.step

    def stepping(batch: Batch) -> Any:
        out = step(batch)
        caches = [row.cache for row in batch.rows]
        taken.append(memory.nbytes + sum(each.nbytes for each in caches if not memory.holds(each)))
        return out

    async def test() -> None:
        settings = ServerSettings("m", max_cache_bytes=most, max_batch=2)
        engine = ServingEngine(drafter, settings)
        engine.start()
        jobs = [job_of(drafter, prompt, str(number), max_new_tokens=60) for number in range(4)]
        for job in jobs:
            engine.submit(job)
        told = await asyncio.gather(*map(ended, jobs))
        assert await asyncio.to_thread(engine.stop, 60)
        model_reply = drafter.target.model.generate(prompt, max_new_tokens=60, do_sample=False)[0, 20:]
        assert all(tokens_of(events) == model_reply.tolist() for events in told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "step", stepping)
        run(test)
    assert taken
    assert max(taken) <= most
    assert memory.nbytes
    if graphs is not None:
        assert graphs.replays
        assert share < 2 or any(rows == 2 for rows, _, _ in graphs._passes)
