"""Drafts for the rows of a batch: requests of the rows, their chains, and lengths that pay."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index.source import TokenArray
from retrieval_draft.integrations.vllm.request_tracker import RequestTracker
from retrieval_draft.integrations.vllm.step_costs import StepCosts

__all__ = ["Chains", "RowDrafter"]

_NOBODY = -1
"""The session of a request without drafts."""


class Chains(Protocol):
    """Interface of sessions that draft one chain each in one call: `drafting.batch.ChainBatch`."""

    def open(self, prompt: TokenArray) -> int:
        """Starts a request with `prompt`, int32, shape (length,); returns its session."""
        ...

    def step(
        self,
        ids: NDArray[np.int64],
        new_tokens: TokenArray,
        counts: NDArray[np.int32],
        max_tokens: NDArray[np.int32],
        min_prob: float,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Appends each row's emitted tokens; returns chains, their lengths and path probabilities.

        Args:
            ids: int64, shape (rows,). Sessions.
            new_tokens: int32, shape (total,). Emitted tokens, row after row.
            counts: int32, shape (rows,). Number of them of each row.
            max_tokens: int32, shape (rows,). Longest chain of each row.
            min_prob: Smallest path probability of a chain's tokens.
        """
        ...

    def close(self, session: int, *, finished: bool = True) -> None:
        """Ends a request."""
        ...


class RowDrafter:
    """Drafts for a batch whose rows are known by their texts alone.

    Args:
        chains: Makes the drafts.
        most: Limit of a row's draft tokens.
        max_rows: Limit of rows in a batch.
        max_length: Limit of a text's tokens.
        vocabulary: Number of ids that the model can embed; a draft ends before any other id.
        eos: Tokens that end a reply. Tokens after one in the same step wait until the request's next step,
            which exists only where the end is ignored; so they never enter the history.
        costs: Chooses lengths that pay; None to draft as far as `min_prob` allows.
        min_prob: Smallest path probability of a draft.
        clock: Returns seconds.

    Attributes:
        tracker: The known requests.
        drafted: Draft tokens so far.
        steps: Calls so far.
    """

    def __init__(
        self,
        chains: Chains,
        *,
        most: int,
        max_rows: int,
        max_length: int,
        vocabulary: int,
        eos: Collection[int] = (),
        costs: StepCosts | None = None,
        min_prob: float = 0.05,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._chains = chains
        self._most = most
        self._max_length = max_length
        self._vocabulary = vocabulary
        self._eos = frozenset(eos)
        self.costs = costs
        self._min_prob = min_prob
        self._clock = clock
        self.tracker = RequestTracker(2 * max_rows + 2, self._over)
        self._held: dict[int, list[int]] = {}
        self._endless: set[int] = set()
        self._left: float | None = None
        self.drafted = 0
        self.steps = 0

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
    ) -> list[list[int]]:
        """Drafts for every row that sampled a token.

        Args:
            sampled_token_ids: Tokens that each row sampled in this step; empty where its prompt is not
                finished.
            num_tokens_no_spec: int32, shape (batch,) or more. Tokens of each text, the sampled included.
            token_ids_cpu: int32, shape (batch or more, width). The texts; values after their ends are
                ignored.

        Returns:
            For each row its draft; empty where drafting does not pay.
        """
        begin = self._clock()
        batch = len(sampled_token_ids)
        sizes = np.fromiter(map(len, sampled_token_ids), np.int64, batch)
        rows = np.flatnonzero(sizes)
        counts, ends = sizes[rows], num_tokens_no_spec[rows].astype(np.int64)
        tracker = self.tracker
        slots, new = tracker.follow(token_ids_cpu[:batch], rows, ends - counts, ends)
        if self.costs is not None and len(rows) == batch and not new:
            self._time(slots, int(ends.max(initial=0)), begin)
        for index in new:
            start = int(ends[index] - counts[index])
            tracker.sessions[slots[index]] = self._open(token_ids_cpu[rows[index], :start])
        drafts: list[list[int]] = [[] for _ in range(batch)]
        tracker.drafted[slots] = 0
        drafting = tracker.sessions[slots] != _NOBODY
        if drafting.any():
            if not drafting.all():
                rows, slots, ends = rows[drafting], slots[drafting], ends[drafting]
            tokens, lengths = self._chains_of(slots, ends, [sampled_token_ids[row] for row in rows.tolist()])
            tracker.drafted[slots] = lengths
            for row, chain, length in zip(rows.tolist(), tokens.tolist(), lengths.tolist(), strict=True):
                if length:
                    drafts[row] = chain[:length]
            self.drafted += int(lengths.sum())
        self.steps += 1
        self._left = self._clock()
        return drafts

    def finish(self) -> None:
        """Finishes all requests, so that their texts can be drafted from."""
        self.tracker.clear()
        self._left = None

    def _chains_of(
        self, slots: NDArray[np.int64], ends: NDArray[np.int64], sampled: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Chains of rows that have sessions, and the length of each that pays."""
        emitted = self._until_ends(slots, sampled)
        limits = np.clip(self._max_length - ends - 1, 0, self._most)
        limits[self.tracker.ended[slots]] = 0
        min_prob = self._min_prob
        if self.costs is not None:
            min_prob = max(min_prob, self.costs.min_prob(len(slots), self._most))
        tokens, lengths, probs = self._chains.step(
            self.tracker.sessions[slots],
            np.fromiter(itertools.chain.from_iterable(emitted), np.int32),
            np.fromiter(map(len, emitted), np.int32, len(emitted)),
            limits.astype(np.int32),
            min_prob,
        )
        if int(tokens.max(initial=0)) >= self._vocabulary:
            foreign = (tokens >= self._vocabulary) & (np.arange(tokens.shape[1]) < lengths[:, None])
            lengths = np.where(foreign.any(1), foreign.argmax(1), lengths).astype(np.int32)
            probs[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0.0
        if self.costs is not None:
            lengths = self.costs.choose(probs, lengths, int(ends.max()))
        return tokens, lengths

    def _open(self, prompt: TokenArray) -> int:
        """Opens a session; -1 where the text is empty or has ids that are no tokens."""
        if not len(prompt) or int(prompt.max()) >= self._vocabulary or int(prompt.min()) < 0:
            return _NOBODY
        return self._chains.open(np.array(prompt, np.int32))

    def _until_ends(
        self, slots: NDArray[np.int64], sampled: Sequence[Sequence[int]]
    ) -> Sequence[Sequence[int]]:
        """The rows' new tokens to append, up to the ends of their replies."""
        if not self._eos:
            return sampled
        if not self.tracker.ended[slots].any() and self._eos.isdisjoint(
            itertools.chain.from_iterable(sampled)
        ):
            return sampled
        return [self._until_end(slot, each) for slot, each in zip(slots.tolist(), sampled, strict=True)]

    def _until_end(self, slot: int, sampled: Sequence[int]) -> Sequence[int]:
        if slot in self._endless:
            return sampled
        if self.tracker.ended[slot]:  # and it continues anyway
            self.tracker.ended[slot] = False
            self._endless.add(slot)
            return [*self._held.pop(slot, ()), *sampled]
        for index, token in enumerate(sampled):
            if token in self._eos:
                self.tracker.ended[slot] = True
                self._held[slot] = list(sampled[index + 1 :])
                return sampled[: index + 1]
        return sampled

    def _time(self, slots: NDArray[np.int64], longest: int, begin: float) -> None:
        """Records the time of the step that ends here, if it only verified drafts."""
        drafted = self.tracker.drafted[slots]
        if self.costs is not None and self._left is not None and len(slots) and drafted.min() >= 0:
            self.costs.observe(len(slots), len(slots) + int(drafted.sum()), longest, begin - self._left)

    def _over(self, slot: int) -> None:
        self._held.pop(slot, None)
        self._endless.discard(slot)
        session = int(self.tracker.sessions[slot])
        if session != _NOBODY:
            self._chains.close(session)
