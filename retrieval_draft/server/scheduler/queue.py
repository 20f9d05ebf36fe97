"""The bounded queue of requests that wait to join the batch."""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Callable, Mapping

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.scheduler.job import Job, SequenceGroup

__all__ = ["JobQueue"]

_REPLY_WEIGHT = 2
"""Tokens of a prompt that cost as much as one of a reply, in the shares of tenants."""


class JobQueue:
    """Bounded queue in which the tenant comes next that was served least, by tokens over its weight.

    Within a tenant the lowest `priority` comes first, then the first that came. One that comes back after it
    had nothing to do counts as served like the one served least: it saves no turns. Thread-safe.

    Args:
        limit: Limit of waiting choices.
        most: Limit of one tenant; None for that of all.
        weights: Share of a tenant beside the others'; 1 for those that are not named.
    """

    def __init__(
        self, limit: int, most: int | None = None, weights: Mapping[str, float] | None = None
    ) -> None:
        self._limit = limit
        self._most = limit if most is None else most
        self._weights = dict(weights or {})
        self._groups: dict[str, list[SequenceGroup]] = {}
        self._served: dict[str, float] = {}
        self._reached = 0.0
        self._waiting = 0
        self._changed = threading.Condition()
        self._refuses: ApiError | None = None
        self._ended = False

    def put(self, job: Job) -> None:
        """Adds a job.

        Raises:
            ApiError: The queue is full (429), or the server is about to stop (503).
        """
        with self._changed:
            if self._refuses is not None:
                raise self._refuses
            if self._waiting + job.size > self._limit:
                raise ApiError(
                    429,
                    f"{self._waiting} choices wait already; no more than {self._limit} may.",
                    retry_after=1,
                )
            mine = sum(len(group.choices) for group in self._groups.get(job.tenant, ()))
            if mine + job.size > self._most:
                raise ApiError(
                    429,
                    f"{mine} choices of this tenant wait already; no more than {self._most} may.",
                    retry_after=1,
                )
            if job.tenant not in self._groups:
                self._begin(job.tenant)
            for group in job.groups:
                insort(self._groups[job.tenant], group, key=_priority)
            self._waiting += job.size
            self._changed.notify_all()

    def _begin(self, tenant: str) -> None:
        """Adds a tenant with nothing waiting."""
        least = min((self._served[other] for other in self._groups), default=self._reached)
        self._served[tenant] = max(self._served.get(tenant, 0.0), least)
        self._groups[tenant] = []

    def serve(self, tenant: str, prompt: int, reply: int) -> None:
        """Counts tokens of a tenant that were passed or decoded."""
        tokens = prompt + _REPLY_WEIGHT * reply
        with self._changed:
            served = self._served.get(tenant, 0.0)
            self._served[tenant] = served + tokens / self._weights.get(tenant, 1.0)

    def refuse(self, error: ApiError) -> None:
        """Refuses jobs from now on."""
        with self._changed:
            self._refuses = error

    def end(self) -> None:
        """Ends the engine's thread once the queue is empty."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self) -> bool:
        """Waits for work; False once there will be none."""
        with self._changed:
            while not self._groups and not self._ended:
                self._changed.wait()
            return bool(self._groups)

    def next(
        self, free_rows: int, fits: Callable[[SequenceGroup], bool] = lambda group: True
    ) -> SequenceGroup | None:
        """The first group of the tenant whose turn it is, if it fits; none overtakes one that does not.

        Its prompt counts as served.

        Args:
            free_rows: Rows that it may take.
            fits: Whether it fits otherwise.
        """
        with self._changed:
            tenant = min(self._groups, key=self._served.__getitem__, default=None)
            if tenant is None:
                return None
            group = self._groups[tenant][0]
            if len(group.choices) > free_rows or not fits(group):
                return None
            self._reached = self._served[tenant]  # where a tenant begins that comes while none waits
            waiting = self._groups.pop(tenant)
            del waiting[0]
            if waiting:
                self._groups[tenant] = waiting  # after the others
            self._waiting -= len(group.choices)
        self.serve(tenant, len(group.choices[0].request.prompt), 0)
        return group

    def jobs(self) -> list[Job]:
        """Jobs with waiting choices."""
        with self._changed:
            return list(dict.fromkeys(group.job for waiting in self._groups.values() for group in waiting))

    def drop(self, job: Job) -> None:
        """Removes the waiting choices of a job."""
        with self._changed:
            kept = [group for group in self._groups.get(job.tenant, ()) if group.job is not job]
            if kept:
                self._groups[job.tenant] = kept
            else:
                self._groups.pop(job.tenant, None)
            self._waiting = sum(len(group.choices) for each in self._groups.values() for group in each)

    @property
    def waiting(self) -> int:
        """Choices that wait."""
        return self._waiting


def _priority(group: SequenceGroup) -> int:
    return group.job.priority
