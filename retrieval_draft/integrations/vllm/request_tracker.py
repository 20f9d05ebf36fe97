"""Which request each row of vLLM's batch is, told from its text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RequestTracker", "TrackedRequest"]

ABSENT_STEPS = 16
"""A request that is missing for more steps is over; one that was preempted for longer is opened again."""


@dataclass(slots=True, eq=False)
class TrackedRequest:
    """A request as far as its rows have shown it.

    Attributes:
        slot: Its place in the tracker; nobody else has it while the request is tracked.
        length: Tokens of its text, those of this step included.
        start: Tokens before those of this step.
        fresh: Whether this step is its first.
        absent: Steps since its row was last seen; 0 in this one.
        session: Whatever its user keeps with it.
        ended: Whether its user takes it for complete; it is let go as soon as its row is missing.
    """

    slot: int
    length: int
    start: int = 0
    fresh: bool = True
    absent: int = 0
    session: int = -1
    ended: bool = False


class RequestTracker:
    """Follows requests through vLLM's batch, whose rows carry no names.

    Rows move when others finish, leave when their request is preempted, and are taken over by other requests.
    So a row is a known request only if its whole text before this step's tokens equals that request's whole
    text; a row with any other text is a new request. What is not seen any more is handed to `over`: at once
    if it had ended or if a new request has come, for those come after preempted ones; else after
    `ABSENT_STEPS` steps; and the longest absent when there is no room.

    Args:
        slots: Requests to track at a time, absent ones included.
        over: Called with each request that is over.
    """

    def __init__(self, slots: int, over: Callable[[TrackedRequest], None]) -> None:
        self._slots = slots
        self._over = over
        self._requests: dict[int, TrackedRequest] = {}
        self._lengths = np.full(slots, -1, np.int64)
        self._claimed = np.empty(slots, np.bool_)
        self._known: NDArray[np.int32] | None = None
        self._free = list(range(slots - 1, -1, -1))
        self._owners: NDArray[np.int64] = np.full(0, -1, np.int64)

    def __len__(self) -> int:
        """Requests tracked, absent ones included."""
        return len(self._requests)

    @property
    def requests(self) -> list[TrackedRequest]:
        """All requests tracked."""
        return list(self._requests.values())

    def follow(
        self,
        token_ids: NDArray[np.int32],
        rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> list[TrackedRequest]:
        """Says which request each row is.

        Args:
            token_ids: int32, shape (batch, width). Texts of the batch; its width is the same at every call.
            rows: int64, shape (n,). Rows with new tokens, n at most `slots`.
            starts: int64, shape (n,). Tokens of their texts before this step.
            ends: int64, shape (n,). Tokens of their texts.

        Returns:
            The request of each row.
        """
        from retrieval_draft.index._kernels.rows import follow_rows

        if self._known is None or self._known.shape[1] != token_ids.shape[1]:
            self.clear()
            # Pages are only there once they are written: as much memory as texts, not as the room for them.
            self._known = np.zeros((self._slots, token_ids.shape[1]), np.int32)
        if len(self._owners) < len(token_ids):
            self._owners = np.concatenate(
                (self._owners, np.full(len(token_ids) - len(self._owners), -1, np.int64))
            )
        found = np.empty(len(rows), np.int64)
        follow_rows(
            token_ids,
            rows,
            starts,
            ends,
            self._owners[rows],
            self._known,
            self._lengths,
            self._claimed,
            found,
        )
        for request in self._requests.values():
            request.absent += 1
        slots = found.tolist()
        for slot, start, end in zip(slots, starts.tolist(), ends.tolist(), strict=True):
            if slot >= 0:
                request = self._requests[slot]
                request.start, request.length, request.fresh, request.absent = start, end, False, 0
        new = [place for place, slot in enumerate(slots) if slot < 0]
        self._let_go(bool(new), len(new))
        for place in new:
            row, end = rows[place], int(ends[place])
            slot = found[place] = slots[place] = self._free.pop()
            self._known[slot, :end] = token_ids[row, :end]
            self._lengths[slot] = end
            self._requests[slot] = TrackedRequest(slot, end, int(starts[place]))
        self._owners[:] = -1
        self._owners[rows] = found
        return [self._requests[slot] for slot in slots]

    def text(self, request: TrackedRequest) -> NDArray[np.int32]:
        """All tokens of a tracked request: int32, a copy."""
        assert self._known is not None
        return np.array(self._known[request.slot, : request.length], np.int32)

    def clear(self) -> None:
        """Lets all requests go."""
        for request in self.requests:
            self._drop(request)

    def _let_go(self, new_ones: bool, needed: int) -> None:
        absent = [request for request in self._requests.values() if request.absent]
        for request in sorted(absent, key=lambda each: -each.absent):
            late = request.absent > ABSENT_STEPS or len(self._free) < needed
            if late or request.ended or new_ones:
                self._drop(request)

    def _drop(self, request: TrackedRequest) -> None:
        del self._requests[request.slot]
        self._lengths[request.slot] = -1
        self._owners[self._owners == request.slot] = -1
        self._free.append(request.slot)
        self._over(request)
