"""Matching of vLLM's rows to requests, by their texts alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["ABSENT_STEPS", "RequestTracker"]

ABSENT_STEPS = 16
"""A request that is absent for more steps counts as finished; one that was preempted for longer is opened
again."""


class RequestTracker:
    """Tracks requests through vLLM's batch, whose rows have no request ids.

    Rows move when others finish, leave when their request is preempted, and are taken over by other requests.
    So a row is a known request only if its whole text before this step's tokens equals that request's whole
    text; a row with any other text is a new request. A request that is no longer seen is passed to `over`: at
    once if it had ended or if there is a new request, since vLLM resumes preempted requests before new ones;
    else after `ABSENT_STEPS` steps; and the longest absent one when there is no room.

    A request is identified by its slot, which no other request has while it is tracked.

    Args:
        slots: Requests to track at a time, absent ones included.
        over: Called with the slot of each finished request, before the slot is freed.

    Attributes:
        lengths: int64, shape (slots,). Tokens of each text; -1 for free slots.
        sessions: int64, shape (slots,). Value that the user keeps with a request; -1 for a new one.
        drafted: int64, shape (slots,). Likewise.
        ended: bool, shape (slots,). Set by the user for a complete request: it is dropped as soon as its row
            is missing.

    Example:
        rows [5 6 | 7] and [5 6 | 8] are new: slots 0 and 1; then [5 6 8 | 9], its row moved: slot 1
    """

    def __init__(self, slots: int, over: Callable[[int], None]) -> None:
        self._over = over
        self.lengths = np.full(slots, -1, np.int64)
        self.sessions = np.full(slots, -1, np.int64)
        self.drafted = np.full(slots, -1, np.int64)
        self.ended = np.zeros(slots, np.bool_)
        self._seen = np.zeros(slots, np.int64)
        self._step = 0
        self._claimed = np.empty(slots, np.bool_)
        self._known: NDArray[np.int32] | None = None
        self._free = list(range(slots - 1, -1, -1))
        self._owners: NDArray[np.int64] = np.full(0, -1, np.int64)

    def __len__(self) -> int:
        """Requests tracked, absent ones included."""
        return len(self.lengths) - len(self._free)

    def follow(
        self,
        token_ids: NDArray[np.int32],
        rows: NDArray[np.int64],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], list[int]]:
        """Matches rows to requests.

        Args:
            token_ids: int32, shape (batch, width). Texts of the batch; its width is the same at every call.
            rows: int64, shape (n,). Rows with new tokens, n at most `slots`.
            starts: int64, shape (n,). Tokens of their texts before this step.
            ends: int64, shape (n,). Tokens of their texts.

        Returns:
            int64, shape (n,): the slot of each row. And the indices in `rows` of new requests.
        """
        from retrieval_draft.integrations.vllm._kernels.rows import follow_rows

        if self._known is None or self._known.shape[1] != token_ids.shape[1]:
            self.clear()
            # Pages are allocated when they are written: memory follows the texts' lengths, not the capacity.
            self._known = np.zeros((len(self.lengths), token_ids.shape[1]), np.int32)
        if len(self._owners) < len(token_ids):
            more = np.full(len(token_ids) - len(self._owners), -1, np.int64)
            self._owners = np.concatenate((self._owners, more))
        found = np.empty(len(rows), np.int64)
        follow_rows(
            token_ids,
            rows,
            starts,
            ends,
            self._owners[rows],
            self._known,
            self.lengths,
            self._claimed,
            found,
        )
        self._step += 1
        new = np.flatnonzero(found < 0).tolist()
        self._seen[found[found >= 0] if new else found] = self._step
        if len(self) > len(rows) - len(new):
            self._let_go(len(new))
        for index in new:
            end = int(ends[index])
            slot = found[index] = self._free.pop()
            self._known[slot, :end] = token_ids[rows[index], :end]
            self.lengths[slot], self._seen[slot] = end, self._step
            self.sessions[slot] = self.drafted[slot] = -1
            self.ended[slot] = False
        self._owners.fill(-1)
        self._owners[rows] = found
        return found, new

    def text(self, slot: int) -> NDArray[np.int32]:
        """All tokens of a tracked request: int32, a copy."""
        assert self._known is not None
        return np.array(self._known[slot, : self.lengths[slot]], np.int32)

    def clear(self) -> None:
        """Drops all requests."""
        for slot in np.flatnonzero(self.lengths >= 0).tolist():
            self._drop(slot)

    def _let_go(self, new: int) -> None:
        """Drops finished requests, before `new` requests are added."""
        absent = np.flatnonzero((self.lengths >= 0) & (self._seen < self._step))
        for slot in absent[np.argsort(self._seen[absent], kind="stable")].tolist():
            late = self._step - self._seen[slot] > ABSENT_STEPS or len(self._free) < new
            if new or late or self.ended[slot]:
                self._drop(slot)

    def _drop(self, slot: int) -> None:
        self._owners[self._owners == slot] = -1
        self._free.append(slot)
        try:
            self._over(slot)
        finally:
            self.lengths[slot] = -1
