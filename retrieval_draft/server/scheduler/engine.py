"""The thread that owns the model: requests join its batch between two steps, and leave at their end."""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import monotonic

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.drafting.session import DraftSession
from retrieval_draft.engine.cache.footprint import CacheFootprint
from retrieval_draft.engine.decode import Batch
from retrieval_draft.engine.model_state import outside_inference
from retrieval_draft.engine.row import Row
from retrieval_draft.engine.target import Target
from retrieval_draft.http.fair_pool import FairPool
from retrieval_draft.server.errors import ApiError, from_library
from retrieval_draft.server.scheduler.channel import Channel, Ended, Event, Failed, Tokens
from retrieval_draft.server.scheduler.events import EngineListener
from retrieval_draft.server.scheduler.job import Choice, Job, SequenceGroup
from retrieval_draft.server.scheduler.queue import JobQueue
from retrieval_draft.server.scheduler.reports import Reports
from retrieval_draft.server.settings import ServerSettings
from retrieval_draft.serving import ContinuousDrafter

__all__ = ["ServingEngine"]

_log = logging.getLogger("retrieval_draft.server")

_INDEXED_AT_ONCE = 4096
"""Tokens of prompt and references that are indexed on the engine's thread, in a few milliseconds. More are
indexed on another thread, for which the other rows do not wait."""

_OPENING_SECONDS = 0.02
"""Seconds that the engine sleeps at a time while it only waits for such a thread."""

_SLICE_SECONDS = 0.05
"""Target seconds of one pass over a part of a prompt while others wait for their next token."""

_KEEPING_SECONDS = 0.0005
"""Seconds in each turn for copying texts that later requests may continue."""

_NODES = 64
"""Nodes of a tree that a cache has room for beside the text."""

_FIRST_CHUNK, _LEAST_CHUNK = 128, 16

Draftings = list["DraftSession | None"]


@dataclass(slots=True, eq=False)
class _Joining:
    """A group whose text is being indexed, or whose prompt is being passed."""

    group: SequenceGroup
    opening: Future[Draftings]
    began: float
    row: Row | None = None
    draftings: Sequence[DraftSession | None] = ()
    passes: Iterator[None] = field(default_factory=lambda: iter(()))
    turn: int = 0

    def give_up(self) -> None:
        # A thread that still indexes cannot be stopped; its result is closed once it is there.
        if not self.opening.cancel():
            self.opening.add_done_callback(_close_all)


def _close_all(opening: Future[Draftings]) -> None:
    if opening.exception() is None:
        for drafting in opening.result():
            if drafting is not None:
                drafting.close()


class ServingEngine:
    """Decodes the requests of all clients in one batch: in one for each model, where adapters are served.

    Batches step in turns, one pass each. Only `submit`, `give_up`, `refuse`, `stop` and the properties may be
    used from other threads.

    Args:
        drafters: One for each model, or a single one; their locks are held while they have work.
        settings: Limits.
        listeners: Receive the engine's events.
        most_waiting: Limit of one tenant's waiting choices; None for that of all.
    """

    def __init__(
        self,
        drafters: RetrievalDrafter | Sequence[RetrievalDrafter],
        settings: ServerSettings,
        listeners: Sequence[EngineListener] = (),
        most_waiting: int | None = None,
    ) -> None:
        given = [drafters] if isinstance(drafters, RetrievalDrafter) else drafters
        self._drafters = {each.target: each.continuous for each in given}
        self._batches: dict[Target, Batch] = {}
        self._entered = ExitStack()
        self._settings = settings
        self._reports = Reports(listeners)
        self._queue = JobQueue(settings.max_queue, most_waiting, settings.tenant_weights)
        self._footprints: dict[Target, CacheFootprint] = {}
        self._opening = FairPool(max(settings.max_batch, 2), "retrieval-draft-index")
        self._turns: Counter[str] = Counter()
        self._chunk = _FIRST_CHUNK
        self._choices: dict[Row, Choice] = {}
        self._joining: list[_Joining] = []
        self._outbox: dict[Channel, list[Event]] = defaultdict(list)
        self._beat = 0.0
        self._thread = threading.Thread(target=self._run, name="retrieval-draft-engine", daemon=True)

    def start(self) -> None:
        """Finds out what caches take, where their memory is limited, and starts the thread."""
        if self._settings.max_cache_bytes is not None:
            with outside_inference():
                self._footprints = {target: CacheFootprint(target) for target in self._drafters}
        self._thread.start()

    def _bytes(self, choices: Iterable[Choice]) -> int:
        """Bytes that the caches of choices may come to take, where they are limited."""
        return sum(
            self._footprints[choice.job.drafter.target].bytes(choice.request.max_length + _NODES)
            for choice in choices
        )

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
            ApiError: It has more samples than the batch has rows or needs more memory than caches may take
                (400), the queue is full (429), or the engine is about to stop (503).
        """
        job.begin()
        most = self._settings.max_cache_bytes
        needed = 0 if most is None else max(self._bytes(group.choices) for group in job.groups)
        if most is not None and needed > most:
            raise ApiError(
                400,
                f"Prompt and reply may need {needed} bytes of cache; this server has {most}.",
                "max_tokens",
            )
        widest = max(len(group.choices) for group in job.groups)
        if widest > self._settings.max_batch:
            raise ApiError(
                400,
                f"A prompt with {widest} samples needs as many rows; this server decodes "
                f"{self._settings.max_batch} rows together.",
                "n",
            )
        self._queue.put(job)

    def give_up(self, job: Job, error: ApiError) -> None:
        """Ends a job before the next step. No-op if already finished."""
        if job.given_up is None:
            job.given_up = error

    def refuse(self) -> None:
        """Refuses further jobs."""
        self._queue.refuse(ApiError(503, "The server is about to stop.", retry_after=5))

    def give_up_all(self, error: ApiError) -> None:
        """Ends every job before the next step."""
        for job in {*self._queue.jobs(), *self._jobs()}:
            self.give_up(job, error)

    def stop(self, timeout: float | None = None) -> bool:
        """Ends the thread once no work is left, and waits for it."""
        self._queue.end()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._opening.close()
        return not self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of waiting choices."""
        return self._queue.waiting

    @property
    def running(self) -> int:
        """Rows in the batch, those whose prompt is being passed among them."""
        return len(self._choices) + sum(len(joining.group.choices) for joining in list(self._joining))

    @property
    def is_stuck(self) -> bool:
        """True if the thread has died, or a pass takes longer than it may."""
        beat = self._beat
        if self._thread.ident is not None and not self._thread.is_alive():
            return True
        return beat > 0 and monotonic() - beat > self._settings.stuck_seconds

    def _jobs(self) -> list[Job]:
        jobs = [choice.job for choice in list(self._choices.values())]
        return [*jobs, *(joining.group.job for joining in list(self._joining))]

    def _run(self) -> None:
        while self._queue.wait():
            try:
                with self._entered:
                    while self._queue.waiting or self._choices or self._joining:
                        self._turn()
                    for drafter in self._drafters.values():
                        drafter.keep_prefixes()
            except Exception as error:  # an error of one batch must not end the server
                _log.exception("The batch failed, and all of its requests with it.")
                self._fail_all(error)
            finally:
                self._batches.clear()
                self._beat = 0.0
                self._deliver()

    def _batch(self, job: Job) -> Batch:
        """The batch of a job's model; the first job of a model begins it."""
        target = job.drafter.target
        if target not in self._batches:
            running = self._drafters[target].running(self._row_failed)
            self._batches[target] = self._entered.enter_context(running)
        return self._batches[target]

    def _turn(self) -> None:
        self._beat = monotonic()
        self._cancel_expired()
        self._admit()
        for target, batch in self._batches.items():
            self._leave(batch)  # the first token may have been the last
            if batch.rows:
                self._limit_graphs()  # another model's batch may have grown
                self._step(batch, self._drafters[target])
            self._leave(batch)
        self._reports.queue(self._queue.waiting, self.running)
        self._deliver()
        for drafter in self._drafters.values():
            drafter.keep_prefixes(_KEEPING_SECONDS / len(self._drafters))

    def _step(self, batch: Batch, drafter: ContinuousDrafter) -> None:
        step = batch.step()
        for row, plan, tokens in zip(step.rows, step.plans, step.emitted, strict=True):
            choice = self._choices[row]
            if plan.tree.num_draft_tokens:
                choice.accepted_steps[len(row.path) - 1] += 1
            self._send(choice, row, min(len(row.path) - 1, len(tokens)))
        self._reports.step(step, self._choices, drafter.plain_seconds(len(step.rows)))

    def _cancel_expired(self) -> None:
        """Removes jobs that were aborted or have timed out."""
        now = monotonic()
        for job in dict.fromkeys([*self._queue.jobs(), *self._jobs()]):
            if job.given_up is None and now - job.arrived > job.seconds:
                job.given_up = ApiError(504, f"The request took longer than {job.seconds:g} s.")
            if job.given_up is not None:
                self._drop(job, job.given_up, "abort")

    def _drop(self, job: Job, error: ApiError, reason: str) -> None:
        """Removes a job from the queue and the batch, and reports that to its client."""
        job.given_up = error
        self._queue.drop(job)
        for joining in [each for each in self._joining if each.group.job is job]:
            self._joining.remove(joining)
            joining.give_up()
        for row, choice in list(self._choices.items()):
            if choice.job is job:
                del self._choices[row]
                if job.drafter.target in self._batches:
                    self._batches[job.drafter.target].remove(row)
        told = False
        for choice in job.choices:
            if not choice.over:
                told = True
                self._end(choice, "error" if job.failed else reason)
        if told and not job.failed:
            self._outbox[job.channel].append(Failed(error))

    def _admit(self) -> None:
        """One pass over the prompt of one group that joins, and no more before the next step."""
        while True:
            free_rows = self._settings.max_batch - self.running
            group = self._queue.next(free_rows, self._has_memory) if free_rows > 0 else None
            if group is None:
                break
            self._joining.append(_Joining(group, self._open(group), monotonic()))
            self._limit_graphs()
        if not self._joining:
            return
        ready = [joining for joining in self._joining if joining.opening.done()]
        if not ready:
            if not self._choices:  # there is no other work
                wait([joining.opening for joining in self._joining], _OPENING_SECONDS, "FIRST_COMPLETED")
            return
        joining = self._next(ready)
        job = joining.group.job
        try:
            batch = self._batch(job)
            if joining.row is None:
                self._begin(batch, joining)
            has_company = len(self._choices) + len(self._joining) > 1
            chunk = min(self._chunk, self._settings.prefill_chunk)
            prefix_owner = joining.group.choices[0].request
            if not self._drafters[job.drafter.target].passes_whole:
                prefix_owner.prefill_chunk = chunk if has_company else self._settings.prefill_chunk
            began = monotonic()
            more = next(joining.passes, self) is not self
            if has_company:
                seconds = monotonic() - began
                if seconds > _SLICE_SECONDS:
                    self._chunk = max(int(chunk * _SLICE_SECONDS / seconds), _LEAST_CHUNK)
                elif more and seconds < _SLICE_SECONDS / 3:
                    self._chunk = 2 * chunk
            if more:
                return
            row = joining.row
            assert row is not None
            self._joined(joining.group.choices[0], row, joining)
            rest = zip(joining.group.choices[1:], joining.draftings[1:], strict=True)
            for choice, drafting in rest:
                other = batch.row(choice.request, drafting, choice.stats, has_others=True)
                own_pass = choice.request.passed is not None
                for _ in batch.joining(other, None if own_pass else row):
                    pass
                self._joined(choice, other, joining)
            self._joining.remove(joining)
        except Exception as error:  # of the model, or of this request's own processors
            self._drop(job, _failure(job, error), "error")

    def _has_memory(self, group: SequenceGroup) -> bool:
        """True if the caches of a group fit beside those of all that run, at the longest."""
        most = self._settings.max_cache_bytes
        if most is None:
            return True
        joining = [choice for each in self._joining for choice in each.group.choices]
        return self._bytes([*self._choices.values(), *joining, *group.choices]) <= most

    def _limit_graphs(self) -> None:
        """Leaves the memory of passes what caches outside of it cannot come to take.

        A row that leaves them counts again before the next pass; all rows together never come to take more
        than `_has_memory` allows.
        """
        most = self._settings.max_cache_bytes
        passes = [memory for each in self._drafters if (memory := each.pass_memory) is not None]
        if most is None or not passes:
            return

        def is_held(row: Row | None) -> bool:
            return row is not None and any(each.holds(row.cache) for each in passes)

        for memory in passes:
            outside = [choice for row, choice in self._choices.items() if not is_held(row)]
            joining = [choice for each in self._joining for choice in each.group.choices[is_held(each.row) :]]
            others = sum(each.nbytes for each in passes if each is not memory)
            memory.limit(max(most - others - self._bytes([*outside, *joining]), 0))

    def _next(self, ready: Sequence[_Joining]) -> _Joining:
        """The group whose prompt is passed next: tenants take turns, and so do the prompts of one."""
        tenants = {joining.group.job.tenant for joining in self._joining}
        self._turns = Counter({tenant: self._turns[tenant] for tenant in tenants})
        # A new one does not get the turns that the others had before.
        least = min((turns for turns in self._turns.values() if turns), default=0)
        for tenant in tenants:
            self._turns[tenant] = max(self._turns[tenant], least)
        joining = min(ready, key=self._order)
        self._turns[joining.group.job.tenant] += 1
        joining.turn = sum(self._turns.values())
        return joining

    def _order(self, joining: _Joining) -> tuple[int, int, int]:
        job = joining.group.job
        return self._turns[job.tenant], job.priority, joining.turn

    def _open(self, group: SequenceGroup) -> Future[Draftings]:
        """Opens the sources for a group; on another thread where there is much to index.

        They are prepared with the batch of their model, which has begun then.
        """
        opened: Future[Draftings] = Future()
        try:
            self._batch(group.job)
        except Exception as error:
            opened.set_exception(error)
            return opened
        opener = group.job.drafter.continuous
        stats = [choice.stats for choice in group.choices]
        tokens = len(group.choices[0].request.prompt) + sum(map(len, group.prepared.references))
        if tokens > _INDEXED_AT_ONCE and opener.opens_beside:
            return self._opening.submit(group.job.tenant, lambda: opener.open(group.prepared, stats))
        try:
            opened.set_result(opener.open(group.prepared, stats))
        except Exception as error:
            opened.set_exception(error)
        return opened

    def _begin(self, batch: Batch, joining: _Joining) -> None:
        """Makes the row of a group whose sources are open.

        Raises:
            Exception: The error of opening them.
        """
        choices = joining.group.choices
        joining.draftings = joining.opening.result()
        if joining.group.prepared.begin is not None:
            joining.group.prepared.begin()
        has_others = any(other.row is not None for other in self._joining)
        joining.row = batch.row(
            choices[0].request, joining.draftings[0], choices[0].stats, has_others=has_others
        )
        joining.passes = batch.joining(joining.row)

    def _joined(self, choice: Choice, row: Row, joining: _Joining) -> None:
        choice.row, choice.first = row, monotonic()
        self._choices[row] = choice
        self._reports.started(choice, joining.began)
        self._send(choice, row, 0)

    def _leave(self, batch: Batch) -> None:
        for row in batch.leave():
            choice = self._choices.pop(row)
            reason = "length"
            stopped = choice.text is not None and choice.text.stopped is not None
            if stopped or int(row.text.tokens[-1]) in choice.request.eos:
                reason = "stop"
            sampler = choice.request.sampler
            logprob = sampler.logprob if sampler is not None and sampler.logprobs else 0.0
            rest = None if choice.text is None else choice.text.finish()
            self._outbox[choice.job.channel].append(
                Ended(choice.index, reason, choice.stats, logprob, choice.accepted_steps, rest)
            )
            self._end(choice, reason)

    def _send(self, choice: Choice, row: Row, accepted: int) -> None:
        reply, sampler = row.text.reply, choice.request.sampler
        if len(reply) > choice.sent:
            kept = [] if sampler is None else sampler.top[choice.sent : len(reply)]
            tokens = reply[choice.sent :].tolist()
            pieces, offsets = None, []
            if choice.text is not None:
                choice.text.push(reply[len(choice.text.pieces) :].tolist())  # an end token is not text
                pieces = choice.text.pieces[choice.sent : len(reply)]
                offsets = choice.text.offsets[choice.sent : len(reply)]
            self._outbox[choice.job.channel].append(
                Tokens(choice.index, tokens, kept, accepted, pieces, offsets)
            )
            self._queue.serve(choice.job.tenant, 0, len(reply) - choice.sent)
            choice.sent = len(reply)

    def _end(self, choice: Choice, reason: str) -> None:
        choice.over, choice.row = True, None
        job = choice.job
        job.ended += 1
        job.drafter.stats.add(choice.stats)
        self._reports.ended(choice, reason)
        if job.ended == job.size:
            job.release()

    def _row_failed(self, row: Row, error: Exception) -> None:
        choice = self._choices.pop(row, None)
        if choice is None:
            return
        job, failure = choice.job, _failure(choice.job, error)
        if not job.failed:
            self._outbox[job.channel].append(Failed(failure))
        # In the middle of a step: its other rows leave before the next one.
        job.given_up, job.failed = failure, True
        for other in job.choices:
            if not other.over and other.row not in self._choices:
                self._end(other, "error")

    def _fail_all(self, error: Exception) -> None:
        # If no row had joined yet, the waiting jobs would break the next batch too.
        for job in dict.fromkeys(self._jobs() or self._queue.jobs()):
            self._drop(job, from_library(error), "error")
        self._choices.clear()
        self._joining.clear()

    def _deliver(self) -> None:
        """Delivers new events, in one call for each event loop."""
        if not self._outbox:
            return
        outbox, self._outbox = self._outbox, defaultdict(list)
        for loop in {channel.loop for channel in outbox}:
            mine = [(channel, events) for channel, events in outbox.items() if channel.loop is loop]
            try:
                loop.call_soon_threadsafe(_put_all, mine)
            except RuntimeError:  # the loop has ended, and its requests with it
                _log.debug("An event loop has ended before its requests.")


def _failure(job: Job, error: Exception) -> ApiError:
    """The answer to an error of a job, which is logged."""
    _log.error("Request %s failed: %r", job.id, error, exc_info=error)
    failure, field = from_library(error), job.grammar_field
    if failure.status == 400 and failure.param is None and field is not None:  # of the grammar, midway
        return ApiError(400, f"{field}: {failure.message}", field)
    return failure


def _put_all(events: Sequence[tuple[Channel, Sequence[Event]]]) -> None:
    for channel, each in events:
        channel.put(each)
