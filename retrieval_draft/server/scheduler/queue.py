"""The bounded queue of requests that wait to join the batch."""

from __future__ import annotations

import threading
from collections import deque

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.scheduler.job import Job, SequenceGroup

__all__ = ["JobQueue"]


class JobQueue:
    """Bounded queue in which tenants take turns; first in, first out within a tenant. Thread-safe.

    Args:
        limit: Limit of waiting choices.
        most: Limit of one tenant; None for that of all.
    """

    def __init__(self, limit: int, most: int | None = None) -> None:
        self._limit = limit
        self._most = limit if most is None else most
        self._groups: dict[str, deque[SequenceGroup]] = {}
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
            self._groups.setdefault(job.tenant, deque()).extend(job.groups)
            self._waiting += job.size
            self._changed.notify_all()

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

    def next(self, free_rows: int) -> SequenceGroup | None:
        """The first group of the tenant whose turn it is, if it fits into so many free rows."""
        with self._changed:
            tenant = next(iter(self._groups), None)
            if tenant is None or len(self._groups[tenant][0].choices) > free_rows:
                return None
            waiting = self._groups.pop(tenant)
            group = waiting.popleft()
            if waiting:
                self._groups[tenant] = waiting  # after the others
            self._waiting -= len(group.choices)
            return group

    def jobs(self) -> list[Job]:
        """Jobs with waiting choices."""
        with self._changed:
            return list(dict.fromkeys(group.job for waiting in self._groups.values() for group in waiting))

    def drop(self, job: Job) -> None:
        """Removes the waiting choices of a job."""
        with self._changed:
            kept = deque(group for group in self._groups.get(job.tenant, ()) if group.job is not job)
            if kept:
                self._groups[job.tenant] = kept
            else:
                self._groups.pop(job.tenant, None)
            self._waiting = sum(len(group.choices) for each in self._groups.values() for group in each)

    @property
    def waiting(self) -> int:
        """Choices that wait."""
        return self._waiting
