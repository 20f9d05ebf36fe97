"""Drafts for the rows of a batch: which request each is, what may follow, and how much of it pays."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval_draft.index.source import TokenArray
from retrieval_draft.integrations.vllm.request_tracker import RequestTracker, TrackedRequest
from retrieval_draft.integrations.vllm.step_costs import StepCosts

__all__ = ["Chains", "RowDrafter"]

_NOBODY = -1
"""The session of a request that is not drafted for."""


class Chains(Protocol):
    """Sessions that are asked for one chain each, all at once: `retrieval_draft.chains.ChainBatch`."""

    def open(self, prompt: TokenArray) -> int:
        """Starts a request; returns its session."""
        ...

    def step(
        self,
        ids: NDArray[np.int64],
        new_tokens: TokenArray,
        counts: NDArray[np.int32],
        max_tokens: NDArray[np.int32],
        floor: float,
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Takes in what each row emitted; returns chains, their lengths and path probabilities."""
        ...

    def close(self, session: int, *, finished: bool = True) -> None:
        """Ends a request."""
        ...


class RowDrafter:
    """Drafts for a batch whose rows are known by their texts alone.

    Args:
        chains: Where drafts come from.
        most: Draft tokens of a row at most.
        max_rows: Rows of a batch at most.
        max_length: Tokens of a text at most.
        vocabulary: Ids the model can embed; a draft ends before any other.
        eos: Tokens that end a reply. What comes behind one in the same step waits until its request comes
            again, as it does only where the end is ignored; so it never gets into the history.
        costs: How long drafts pay; None to draft all that `floor` allows.
        floor: A draft ends before its path probability falls below it.
        clock: Seconds.

    Attributes:
        tracker: Which requests are known.
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
        floor: float = 0.05,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._chains = chains
        self._most = most
        self._max_length = max_length
        self._vocabulary = vocabulary
        self._eos = frozenset(eos)
        self.costs = costs
        self._floor = floor
        self._clock = clock
        self.tracker = RequestTracker(2 * max_rows + 2, self._over)
        self._held: dict[int, list[int]] = {}
        self._endless: set[int] = set()
        self._drafted: dict[int, int] = {}
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
            sampled_token_ids: What each row sampled in this step; empty where its prompt is not through yet.
            num_tokens_no_spec: int32, shape (batch,) or more. Tokens of each text, the sampled included.
            token_ids_cpu: int32, shape (batch or more, width). The texts; anything may follow behind them.

        Returns:
            For each row what may follow; empty where drafting does not pay.
        """
        begin = self._clock()
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [row for row, sampled in enumerate(sampled_token_ids) if len(sampled)]
        places = np.array(rows, np.int64)
        counts = np.array([len(sampled_token_ids[row]) for row in rows], np.int64)
        ends = num_tokens_no_spec[places].astype(np.int64)
        requests = self.tracker.follow(token_ids_cpu[: len(drafts)], places, ends - counts, ends)
        self._time(begin, requests, int(counts.sum()), len(rows) == len(drafts))
        for place, request in enumerate(requests):
            if request.fresh:
                request.session = self._open(token_ids_cpu[rows[place], : request.start])
        kept = [place for place, request in enumerate(requests) if request.session != _NOBODY]
        self._drafted = dict.fromkeys((request.slot for request in requests), 0)
        if kept:
            known = [requests[place] for place in kept]
            emitted = [self._until_end(requests[place], sampled_token_ids[rows[place]]) for place in kept]
            for place, chain in zip(kept, self._chains_of(known, emitted), strict=True):
                drafts[rows[place]] = chain
                self._drafted[requests[place].slot] = len(chain)
                self.drafted += len(chain)
        self.steps += 1
        self._left = self._clock()
        return drafts

    def finish(self) -> None:
        """Takes all requests for over: what they said can be drafted from."""
        self.tracker.clear()
        self._left = None

    def _chains_of(
        self, requests: Sequence[TrackedRequest], emitted: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        limits = [
            0 if request.ended else max(0, min(self._most, self._max_length - request.length - 1))
            for request in requests
        ]
        tokens, lengths, probs = self._chains.step(
            np.array([request.session for request in requests], np.int64),
            np.fromiter(itertools.chain.from_iterable(emitted), np.int32),
            np.array([len(each) for each in emitted], np.int32),
            np.array(limits, np.int32),
            self._floor,
        )
        foreign = (tokens >= self._vocabulary) & (np.arange(tokens.shape[1]) < lengths[:, None])
        if foreign.any():
            lengths = np.where(foreign.any(1), foreign.argmax(1), lengths).astype(np.int32)
        if self.costs is None:
            worth = lengths.tolist()
        else:
            worth = self.costs.choose(probs, lengths, [request.length for request in requests])
        return [chain[:length] for chain, length in zip(tokens.tolist(), worth, strict=True)]

    def _open(self, prompt: TokenArray) -> int:
        """A session; nobody's where the text has ids that stand for something else, or is empty."""
        if not len(prompt) or int(prompt.max()) >= self._vocabulary or int(prompt.min()) < 0:
            return _NOBODY
        return self._chains.open(np.array(prompt, np.int32))

    def _until_end(self, request: TrackedRequest, sampled: Sequence[int]) -> Sequence[int]:
        """What to take in of a row's new tokens."""
        if not self._eos or request.slot in self._endless:
            return sampled
        if request.ended:  # and it goes on all the same
            request.ended = False
            self._endless.add(request.slot)
            return [*self._held.pop(request.slot, ()), *sampled]
        for place, token in enumerate(sampled):
            if token in self._eos:
                request.ended = True
                self._held[request.slot] = list(sampled[place + 1 :])
                return sampled[: place + 1]
        return sampled

    def _time(
        self, begin: float, requests: Sequence[TrackedRequest], emitted: int, decoded_only: bool
    ) -> None:
        """Notes the step that ends here, if it verified drafts and did nothing else."""
        drafted = [self._drafted.get(request.slot) for request in requests]
        known = [each for each in drafted if each is not None]
        if (
            self.costs is None
            or self._left is None
            or not requests
            or not decoded_only
            or len(known) < len(drafted)
            or any(request.fresh for request in requests)
        ):
            return
        tokens = len(known) + sum(known)
        longest = max(request.length for request in requests)
        self.costs.observe(len(known), tokens, emitted, longest, begin - self._left)

    def _over(self, request: TrackedRequest) -> None:
        self._held.pop(request.slot, None)
        self._endless.discard(request.slot)
        self._drafted.pop(request.slot, None)
        if request.session != _NOBODY:
            self._chains.close(request.session)
