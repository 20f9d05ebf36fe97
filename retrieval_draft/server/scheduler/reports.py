"""Reports of the engine to its listeners; one that raises is removed."""

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
    """Listeners, called on the engine's thread.

    Args:
        listeners: The listeners to call.
    """

    def __init__(self, listeners: Sequence[EngineListener]) -> None:
        self._listeners = list(listeners)
        self._queue = (-1, -1)

    def queue(self, waiting: int, running: int) -> None:
        """Reports the numbers of waiting and running choices, if they have changed."""
        if (waiting, running) != self._queue:
            self._queue = (waiting, running)
            self._tell(lambda listener: listener.queue_changed(waiting, running))

    def started(self, choice: Choice, joined: float) -> None:
        """Reports the first token of a choice.

        Args:
            choice: The choice.
            joined: Start of its prompt's pass, on the monotonic clock.
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
            choice.stats.cached_tokens,
        )
        self._tell(lambda listener: listener.request_started(start))

    def step(self, step: Step, choices: dict[Row, Choice], plain_seconds: float) -> None:
        """Reports a step."""
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
        """Reports the end of a choice."""
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
            except Exception:  # a listener must not stop the engine
                _log.exception("A listener raised and is left out from now on: %r", listener)
                self._listeners.remove(listener)
