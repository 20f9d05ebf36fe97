"""Tells listeners what the engine does; one that raises is left out from then on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic

from retrieval_draft.engine.decode import Step
from retrieval_draft.engine.row import Row
from retrieval_draft.server.scheduler.events import (
    EngineListener,
    RequestEnd,
    RequestStart,
    RowStep,
    StepReport,
)
from retrieval_draft.server.scheduler.job import Choice

__all__ = ["Reports"]

_log = logging.getLogger("retrieval_draft.server")


class Reports:
    """Listeners, told on the engine's thread.

    Args:
        listeners: Who listens.
    """

    def __init__(self, listeners: Sequence[EngineListener]) -> None:
        self._listeners = list(listeners)
        self._queue = (-1, -1)

    def queue(self, waiting: int, running: int) -> None:
        """Says how many wait and run, if that has changed."""
        if (waiting, running) != self._queue:
            self._queue = (waiting, running)
            self._tell(lambda listener: listener.queue_changed(waiting, running))

    def started(self, choice: Choice, joined: float) -> None:
        """Says that a choice has its first token.

        Args:
            choice: Which.
            joined: When its prompt's pass began, on the monotonic clock.
        """
        job = choice.job
        start = RequestStart(
            job.id,
            choice.index,
            job.tenant,
            len(choice.request.prompt),
            max(joined - job.arrived, 0.0),
            choice.stats.prefill_seconds,
            job.traceparent,
        )
        self._tell(lambda listener: listener.request_started(start))

    def step(self, step: Step, choices: dict[Row, Choice], plain_seconds: float) -> None:
        """Says what a step did."""
        if not self._listeners:
            return
        rows = [
            RowStep(choices[row].job.id, choices[row].index, plan, row.path, tokens)
            for row, plan, tokens in zip(step.rows, step.plans, step.emitted, strict=True)
            if row in choices
        ]
        report = StepReport(
            rows,
            step.draft_seconds,
            step.forward_seconds,
            step.commit_seconds,
            step.learn_seconds,
            step.seconds,
            plain_seconds,
        )
        self._tell(lambda listener: listener.step(report))

    def ended(self, choice: Choice, reason: str) -> None:
        """Says that a choice is over."""
        job, now = choice.job, monotonic()
        end = RequestEnd(
            job.id,
            choice.index,
            job.tenant,
            reason,
            len(choice.request.prompt),
            choice.stats.tokens,
            choice.first - job.arrived if choice.first else 0.0,
            now - job.arrived,
            choice.stats,
            job.client_id,
        )
        self._tell(lambda listener: listener.request_ended(end))

    def _tell(self, call: Callable[[EngineListener], None]) -> None:
        for listener in list(self._listeners):
            try:
                call(listener)
            except Exception:  # who watches must not stop what is watched
                _log.exception("A listener raised and is left out from now on: %r", listener)
                self._listeners.remove(listener)
