"""The drafting service: opens sessions, receives the tokens that engines emitted, and returns draft trees."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Protocol

import numpy as np

from retrieval_draft.draft_service import wire
from retrieval_draft.draft_service.errors import DraftServiceError, OutOfStepError
from retrieval_draft.draft_service.limits import SessionLimits
from retrieval_draft.draft_service.sessions import OpenSession, SessionTable, unknown
from retrieval_draft.draft_service.tenants import Proposers
from retrieval_draft.draft_service.top_logprobs import node_logits
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.errors import RetrievalDraftError
from retrieval_draft.http.json_response import error_type
from retrieval_draft.index.source import CONTEXT, TokenArray
from retrieval_draft.proposer import ProposerSession

__all__ = ["DraftObserver", "DraftService", "failure_of"]

_log = logging.getLogger("retrieval_draft")


class DraftObserver(Protocol):
    """Receives the service's events, on the thread that causes them."""

    def session_opened(self, seconds: float) -> None:
        """Receives the opening of a session and its duration."""
        ...

    def session_closed(self, reason: str) -> None:
        """Receives the end of a session: "finished", "dropped", "expired" or "shutdown"."""
        ...

    def stepped(self, emitted: int, accepted: int, nodes: int, seconds: float) -> None:
        """Receives a step: new tokens, drafted ones among them, nodes of the draft, and seconds."""
        ...

    def failed(self, status: int) -> None:
        """Receives the failure of a request or a step."""
        ...


class _Nobody:
    """Observer that does nothing."""

    def session_opened(self, seconds: float) -> None:
        pass

    def session_closed(self, reason: str) -> None:
        pass

    def stepped(self, emitted: int, accepted: int, nodes: int, seconds: float) -> None:
        pass

    def failed(self, status: int) -> None:
        pass


class DraftService:
    """Sessions of engines that keep their own model. Safe to use from several threads.

    Args:
        proposers: The proposer of each tenant. Closed with the service.
        limits: Limits on open sessions.
        observer: Receives the service's events.

    Attributes:
        table: The open sessions.
        proposers: As given.
    """

    def __init__(
        self, proposers: Proposers, limits: SessionLimits | None = None, observer: DraftObserver | None = None
    ) -> None:
        self.proposers = proposers
        self.table = SessionTable(limits if limits is not None else SessionLimits())
        self.observer: DraftObserver = observer if observer is not None else _Nobody()
        self._unsettled: deque[OpenSession] = deque()
        self._stopped = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="retrieval_draft sessions", daemon=True)
        self._sweeper.start()

    def info(self, tenant: str) -> wire.Info:
        """Describes the service for a tenant."""
        proposer, limits = self.proposers[tenant], self.table.limits
        return wire.Info(
            vocabulary=proposer.stores.vocabulary,
            fingerprint=self.proposers.fingerprint,
            sessions=self.table.count(tenant),
            max_sessions=limits.max_sessions,
            max_session_tokens=limits.max_session_tokens,
            idle_seconds=limits.idle_seconds,
            store="" if proposer.store is None else proposer.store.health.state,
        )

    def open(self, tenant: str, request: wire.OpenRequest) -> wire.OpenReply:
        """Starts a session.

        Raises:
            InvalidInputError: An id lies outside the vocabulary, or there is no store to share with.
            OutOfStepError: The engine's tokenizer is another one.
            ServiceFullError: Too many sessions or tokens are open.
            TooLargeError: The texts are too long.
        """
        begin = time.perf_counter()
        if self._stopped.is_set():
            raise DraftServiceError("The service is shutting down.")
        _check_fingerprint(request.fingerprint, self.proposers.fingerprint)
        size = len(request.prompt) + sum(map(len, request.references))
        self.table.reserve(size)
        proposing: ProposerSession | None = None
        try:
            proposer = self.proposers[tenant]
            prompt = _ids(request.prompt)
            proposing = proposer.open(
                prompt, [_ids(each) for each in request.references], share=request.share
            )
            drafted = _propose(proposing, request, prompt[-1:])
        except BaseException:
            if proposing is not None:
                proposing.close(finished=False)
            self.table.give_back(size)
            raise
        session = self.table.add(tenant, proposing, prompt[-CONTEXT:], size)
        session.tree = drafted
        self.observer.session_opened(time.perf_counter() - begin)
        if self._stopped.is_set():  # `close` may have run before it was added
            self._drop(session, "shutdown")
        return wire.OpenReply(session.key, _draft(drafted, 0, proposing.length))

    def step(self, tenant: str, step: wire.Step) -> wire.Draft:
        """Appends the tokens that a session's engine emitted and returns the next draft.

        Raises:
            UnknownSessionError: The tenant has no such session.
            OutOfStepError: The engine's text is another one.
            InvalidInputError: An id lies outside the vocabulary, or `top_logprobs` is no table.
            ServiceFullError: All texts together would be too long.
            TooLargeError: The session's text would be.
        """
        begin = time.perf_counter()
        session = self.table.get(tenant, step.session)
        with session.lock:
            if session.closed:
                raise unknown(step.session)
            emitted, accepted = self._take(session, step)
            tree = None
            if step.close is None:
                tree = session.tree = _propose(session.proposing, step, session.tail[-1:])
            reply = _draft(tree, accepted, session.proposing.length)
            if step.close is not None:
                self._end(session, step.close)
        nodes = 0 if tree is None else tree.num_draft_tokens
        self.observer.stepped(emitted, accepted if emitted else 0, nodes, time.perf_counter() - begin)
        return reply

    def steps(self, tenant: str, steps: list[wire.Step]) -> list[wire.Draft]:
        """Steps of several sessions; one that fails has the error in its draft, the others continue."""
        return [self._try_step(tenant, step) for step in steps]

    def apply_feedback(self) -> None:
        """Learns from the results of the last steps besides their tokens; no reply waits for that."""
        while self._unsettled:
            with suppress(IndexError):  # another thread was faster
                session = self._unsettled.popleft()
                if session.lock.acquire(blocking=False):  # else its next step has begun, and learns it first
                    try:
                        session.proposing.apply_feedback()
                    finally:
                        session.lock.release()

    def is_free(self, tenant: str, key: str) -> bool:
        """True if a step of the session would probably not wait for another thread.

        Raises:
            UnknownSessionError: The tenant has no such session.
        """
        if self.table.get(tenant, key).lock.locked():
            return False
        lock = self.proposers[tenant].lock
        free = lock.acquire(blocking=False)
        if free:
            lock.release()
        return free

    def close(self) -> None:
        """Ends all sessions and closes the proposers."""
        self._stopped.set()
        for session in self.table.all():
            self._drop(session, "shutdown")
        self._sweeper.join(5.0)
        self.proposers.close()

    def expire(self) -> int:
        """Closes sessions that were idle for too long; returns their number."""
        over = self.table.expired()
        for session in over:
            self._drop(session, "expired")
        return len(over)

    def _try_step(self, tenant: str, step: wire.Step) -> wire.Draft:
        try:
            return self.step(tenant, step)
        except RetrievalDraftError as error:
            failure = failure_of(error)
            self.observer.failed(failure.code)
            return wire.Draft(error=failure)

    def _take(self, session: OpenSession, step: wire.Step) -> tuple[int, int]:
        """Appends a step's tokens; returns the numbers of new tokens, and of those that had been drafted."""
        tokens = _ids(step.tokens)
        at = session.proposing.length
        if step.at is not None and step.at != at:
            known = session.last_tokens
            again = step.at == session.last_at and np.array_equal(tokens[: len(known)], known)
            if not again:
                raise OutOfStepError(
                    f"The service has a text of {at} tokens; the step begins at {step.at}.",
                    "Send every token once and in order, or open another session.",
                )
            tokens = tokens[len(known) :]
            if not len(tokens):
                return 0, session.last_accepted
        top_logprobs = node_logits(
            step.top_logprobs, tokens, session, self.proposers[session.tenant].stores.vocabulary
        )
        self.table.grow(session, len(tokens))
        try:
            accepted = session.proposing.observe(tokens, top_logprobs, later=top_logprobs is None)
        except BaseException:
            self.table.shrink(session, len(tokens))
            raise
        if len(tokens):
            session.tail = np.concatenate((session.tail, tokens))[-CONTEXT:]
            session.last_at, session.last_tokens, session.last_accepted = at, tokens, accepted
            self._unsettled.append(session)
        return len(tokens), accepted

    def _end(self, session: OpenSession, reason: str) -> None:
        """Ends a session whose lock is held."""
        session.closed = True
        try:
            session.proposing.close(finished=reason == "finished")
        finally:
            self.table.remove(session)
            self.observer.session_closed(reason)

    def _drop(self, session: OpenSession, reason: str) -> None:
        with session.lock:
            if not session.closed:
                self._end(session, reason)

    def _sweep(self) -> None:
        while not self._stopped.wait(min(10.0, self.table.limits.idle_seconds / 4)):
            try:
                self.expire()
            except Exception:
                _log.exception("Idle sessions could not be closed; the next round tries again.")


def failure_of(error: RetrievalDraftError) -> wire.Failure:
    """The error as a message to the engine."""
    status = 400 if isinstance(error, ValueError) else 500
    if isinstance(error, DraftServiceError):
        status = error.status
    return wire.Failure(error.message, error_type(status), status, hint=error.hint)


def _ids(tokens: list[int]) -> TokenArray:
    return np.array(tokens, np.int32)


def _propose(proposing: ProposerSession, want: wire.Want, root: TokenArray) -> DraftTree | None:
    if want.nodes == 0:
        return None
    if not want.chain:
        return proposing.propose(want.nodes, want.max_depth)
    longest = want.nodes if want.max_depth is None else min(want.max_depth, want.nodes)
    tokens, path_probs = proposing.propose_chain(longest, want.min_prob)
    size = len(tokens) + 1
    path_probs = np.concatenate((np.ones(1, np.float32), path_probs))
    depths = np.arange(size, dtype=np.int32)
    probs = np.concatenate((path_probs[:1], path_probs[1:] / path_probs[:-1]))
    tokens = np.concatenate((root, tokens))
    return DraftTree(tokens, depths - 1, depths, probs, path_probs, np.zeros(size, np.int64))


def _draft(tree: DraftTree | None, accepted: int, length: int) -> wire.Draft:
    if tree is None:
        return wire.Draft(accepted=accepted, length=length)
    return wire.Draft(tree.tokens.tolist(), tree.parents.tolist(), tree.path_probs.tolist(), accepted, length)


def _check_fingerprint(theirs: str, ours: str) -> None:
    if theirs and ours and theirs != ours:
        raise OutOfStepError(
            f"The engine's tokenizer has the fingerprint {theirs}; the service's has {ours}.",
            "Run the service with the tokenizer of the engine's model.",
        )
