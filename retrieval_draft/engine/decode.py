"""The decoding loop: rows of their own lengths, trees and ends behind one forward pass a step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter

from torch import Tensor

from retrieval_draft.engine.budget import Budget
from retrieval_draft.engine.drafting import Drafting
from retrieval_draft.engine.logits import LogitReader, Predictions
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.row import Row
from retrieval_draft.engine.stats import DraftStats
from retrieval_draft.engine.target import Target

__all__ = ["Batch", "decode"]


class Batch:
    """The requests that are decoded together now. One may join or leave between any two steps.

    Args:
        target: The model.
        reader: Reads logits; its `k` is what the sources learn from.
        stats: Counts of what the rows share; their own are theirs.
        budget: Shares draft nodes between the rows.

    Attributes:
        rows: In the order in which they joined.
    """

    def __init__(self, target: Target, reader: LogitReader, stats: DraftStats, budget: Budget) -> None:
        self.rows: list[Row] = []
        self._target, self._reader, self._stats, self._budget = target, reader, stats, budget

    def join(
        self, request: DecodeRequest, drafting: Drafting | None, stats: DraftStats, leader: Row | None = None
    ) -> Row:
        """Adds a request, and decodes its first token.

        Args:
            request: What to decode.
            drafting: Its drafts; None decodes one token a step.
            stats: Its counts.
            leader: A row that just joined with the same prompt and has not stepped since.

        Returns:
            Its row; it may be done already.
        """
        target = self._target
        attention = target.attention if not self.rows else target.attention_of_row()
        row = Row(target, request, drafting, attention, stats)
        with target.watching_hidden(drafting is not None and drafting.wants_hidden):
            if leader is None:
                row.prefill(self._reader)
            else:
                row.fork(leader)
        self.rows.append(row)
        return row

    def leave(self) -> list[Row]:
        """Takes out the rows that are done, each ready to be returned."""
        done = [row for row in self.rows if row.done]
        if done:
            self.rows = [row for row in self.rows if not row.done]
            for row in done:
                row.finish()
                row.forget()
        return done

    def step(self) -> None:
        """Drafts, verifies and accepts in every row."""
        rows, stats = self.rows, self._stats
        started = perf_counter()
        plans = [row.propose() for row in rows]
        sizes = self._budget.share([plan.tree for plan in plans], [row.length for row in rows])
        plans = [plan.cut(size) for plan, size in zip(plans, sizes, strict=True)]
        drafted = perf_counter()
        inputs = [row.prepare(plan) for row, plan in zip(rows, plans, strict=True)]
        packed = perf_counter()
        caches, hidden = [row.cache for row in rows], None
        if any(row.drafting is not None and row.drafting.wants_hidden for row in rows):
            with self._target.watching_hidden():
                logits = self._target.verify_rows(caches, inputs)
                hidden = self._target.hidden
        else:
            logits = self._target.verify_rows(caches, inputs)
        launched = perf_counter()
        begins = [0]
        for given in inputs:
            begins.append(begins[-1] + given.input_ids.shape[1])
        said = self._read(logits, begins, [len(plan.tree) for plan in plans])
        read = perf_counter()
        parts = list(pairwise(begins))
        emitted = [
            row.accept(plan, logits[begin:end], each)
            for row, plan, each, (begin, end) in zip(rows, plans, said, parts, strict=True)
        ]
        accepted = perf_counter()
        # On CUDA the pass is over when its logits have been read; nothing else waits for it.
        forward = (read if self._target.device.type == "cuda" else launched) - packed
        for row, plan, tokens, each, (begin, end) in zip(rows, plans, emitted, said, parts, strict=True):
            row.learn(plan, tokens, each, None if hidden is None else hidden[begin:end])
        longest = max(row.length for row in rows)
        self._budget.timed(len(rows), begins[-1], longest, forward)
        learned = perf_counter()
        self._budget.note_step(len(rows), sum(map(len, emitted)), learned - started, forward)
        stats.passes += 1
        stats.draft_seconds += drafted - started
        stats.commit_seconds += packed - drafted
        stats.forward_seconds += forward
        stats.accept_seconds += accepted - packed - forward
        stats.learn_seconds += perf_counter() - accepted

    def close(self) -> None:
        """Ends what the rows hold, as after an error."""
        for row in self.rows:
            row.forget()
        self.rows = []

    def _read(self, logits: Tensor, begins: Sequence[int], nodes: Sequence[int]) -> list[Predictions]:
        """Summaries of each row's part of the logits, in one copy; padded nodes left out."""
        if len(nodes) == 1:
            return [self._reader.read(logits, nodes[0])]
        whole = self._reader.read(logits)
        return [
            Predictions(*(getattr(whole, name)[begin : begin + size] for name in Predictions.__slots__))
            for begin, size in zip(begins, nodes, strict=False)
        ]


def decode(
    target: Target,
    requests: Sequence[DecodeRequest],
    reader: LogitReader,
    stats: DraftStats,
    draftings: Sequence[Drafting | None] = (),
    budget: Budget | None = None,
    each: Sequence[DraftStats] = (),
) -> list[Row]:
    """Decodes requests together until all are done; those that end early leave the batch.

    Args:
        target: The model.
        requests: What to decode. A leader comes before those it leads.
        reader: Reads logits; its `k` is what the sources learn from.
        stats: Counts to add what the rows share to.
        draftings: Where each request's drafts come from; None for one token a step. Closed here.
        budget: Shares draft nodes between rows; without one all of a tree is verified.
        each: Counts of each request; `stats` without.

    Returns:
        The finished rows, in the order of the requests: their texts and caches.
    """
    batch = Batch(target, reader, stats, budget if budget is not None else Budget())
    rows: dict[DecodeRequest, Row] = {}
    drafted: Sequence[Drafting | None] = draftings or [None] * len(requests)
    try:
        for index, (request, drafting) in enumerate(zip(requests, drafted, strict=True)):
            leader = None if request.leader is None else rows[request.leader]
            rows[request] = batch.join(request, drafting, each[index] if each else stats, leader)
        batch.leave()
        while batch.rows:
            batch.step()
            batch.leave()
    finally:
        batch.close()
        for drafting in drafted:
            if drafting is not None:
                drafting.close()
    return [rows[request] for request in requests]
