"""Requests that wait for a place in the batch, and what other threads ask of the engine."""

from __future__ import annotations

import threading
from collections import deque

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.job import Group, Job

__all__ = ["JobQueue"]


class JobQueue:
    """First come, first served; bounded. Every method may be called from any thread.

    Args:
        limit: Choices that may wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._groups: deque[Group] = deque()
        self._waiting = 0
        self._changed = threading.Condition()
        self._refuses: ApiError | None = None
        self._ended = False

    def put(self, job: Job) -> None:
        """Lets a job wait.

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
            self._groups.extend(job.groups)
            self._waiting += job.size
            self._changed.notify_all()

    def refuse(self, error: ApiError) -> None:
        """Refuses whatever comes from now on."""
        with self._changed:
            self._refuses = error

    def end(self) -> None:
        """Lets the engine's thread end once nothing waits."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self) -> bool:
        """Waits for work; False once there will be none."""
        with self._changed:
            while not self._groups and not self._ended:
                self._changed.wait()
            return bool(self._groups)

    def next(self, places: int) -> Group | None:
        """The first group, if it fits into so many places."""
        with self._changed:
            if not self._groups or len(self._groups[0].choices) > places:
                return None
            group = self._groups.popleft()
            self._waiting -= len(group.choices)
            return group

    def jobs(self) -> list[Job]:
        """Jobs of which something waits."""
        with self._changed:
            return list(dict.fromkeys(group.job for group in self._groups))

    def drop(self, job: Job) -> None:
        """Takes out what waits of a job."""
        with self._changed:
            kept = [group for group in self._groups if group.job is not job]
            self._waiting = sum(len(group.choices) for group in kept)
            self._groups = deque(kept)

    @property
    def waiting(self) -> int:
        """Choices that wait."""
        return self._waiting
