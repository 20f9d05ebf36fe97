"""The decoding loop: one forward pass a step over rows that differ in length, tree and end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from time import perf_counter
from typing import Any

from torch import Tensor

from retrieval_draft.drafting.budget import Budget
from retrieval_draft.drafting.predictions import Predictions
from retrieval_draft.drafting.session import DraftPlan, DraftSession
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine.attention.tree_mask import TreeInputs
from retrieval_draft.engine.logits import BestLogits, LogitReader, Wanted
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.row import Row
from retrieval_draft.engine.target import Target

__all__ = ["Batch", "Step", "decode"]

_log = logging.getLogger("retrieval_draft")

OnError = Callable[[Row, Exception], None]


@dataclass(frozen=True, slots=True)
class Step:
    """Results and timings of one step.

    Attributes:
        rows: Those that stepped; ones that failed are left out.
        plans: The verified drafts, one for each row.
        emitted: Tokens of each row.
        learn_seconds: Updates of sources and calibration with the result of the step before, but for those
            that are made while a device runs the pass.
        draft_seconds: Proposals and choice of the budget.
        commit_seconds: Packing and moving accepted paths.
        forward_seconds: The pass.
        seconds: All of it.
    """

    rows: Sequence[Row]
    plans: Sequence[DraftPlan]
    emitted: Sequence[Sequence[int]]
    learn_seconds: float
    draft_seconds: float
    commit_seconds: float
    forward_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _RowOutput:
    """A row's part of a pass: its drafts, logits and hidden states at their nodes, padding included.

    Attributes:
        best: The best logits of its nodes, where the host has no others.
    """

    plan: DraftPlan
    logits: Tensor
    predictions: Predictions
    hidden: Tensor | None
    best: BestLogits | None


@dataclass(frozen=True, slots=True)
class _Verified:
    """A pass over some rows, and its time; `is_usual` unless a pass was captured meanwhile."""

    outputs: dict[Row, _RowOutput]
    nodes: int
    seconds: float
    is_usual: bool

    def with_own_logits(self) -> _Verified:
        """This, with logits that another pass does not write over, as captured ones do."""
        outputs = {row: replace(output, logits=output.logits.clone()) for row, output in self.outputs.items()}
        return replace(self, outputs=outputs)


@dataclass(frozen=True, slots=True)
class _StepCosts:
    """Time and yield of a step that made one pass: what the budget learns from."""

    rows: int
    nodes: int
    length: int
    emitted: int
    forward_seconds: float
    seconds: float


def _accept(row: Row, output: _RowOutput) -> list[int]:
    return row.accept(output.plan, output.logits, output.predictions, output.hidden, output.best)


class Batch:
    """The requests that are decoded together now. One may join or leave between any two steps.

    A step has two halves. Drafting takes up the results of the step before, and plans the trees of this one;
    the engine passes the trees, and emits what the target chooses in them.

    Args:
        target: The model.
        reader: Reads logits; its `k` is the number of alternatives that the sources learn from.
        stats: Counts that the rows share; rows have their own ones too.
        budget: Splits draft nodes between the rows.
        failed: Called with a row whose own part of a step raised, which leaves the batch; a pass that raises
            is repeated row by row, without drafts, to find the row that causes it. None re-raises errors.

    Attributes:
        rows: In the order in which they joined.
    """

    def __init__(
        self,
        target: Target,
        reader: LogitReader,
        stats: DraftStats,
        budget: Budget,
        failed: OnError | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self._target, self._reader, self._stats, self._budget = target, reader, stats, budget
        self._failed = failed
        self._costs: _StepCosts | None = None
        self._wanted = Wanted()
        # The host is idle while a device runs a pass.
        self._learns_late = target.device.type == "cuda"

    def join(
        self,
        request: DecodeRequest,
        drafting: DraftSession | None,
        stats: DraftStats,
        prefix_owner: Row | None = None,
    ) -> Row:
        """Adds a request, and decodes its first token.

        Args:
            request: The request to decode.
            drafting: Its drafts; None decodes one token a step.
            stats: Its counts.
            prefix_owner: A row that just joined with the same prompt and has not stepped since.

        Returns:
            Its row; it may be done already.
        """
        row = self.row(request, drafting, stats)
        for _ in self.joining(row, prefix_owner):
            pass
        return row

    def row(
        self,
        request: DecodeRequest,
        drafting: DraftSession | None,
        stats: DraftStats,
        has_others: bool = False,
    ) -> Row:
        """A row that has not joined yet.

        Args:
            request: The request to decode.
            drafting: Its drafts; None decodes one token a step.
            stats: Its counts.
            has_others: Whether there is another row that has not joined yet.
        """
        target = self._target
        attention = target.attention_of_row() if self.rows or has_others else target.attention
        return Row(target, request, drafting, attention, stats)

    def joining(self, row: Row, prefix_owner: Row | None = None) -> Iterator[None]:
        """Passes a row's prompt, and adds the row. Yields between passes, when other rows may step."""
        hidden = row.drafting is not None and row.drafting.wants_hidden
        if prefix_owner is not None:
            with self._target.watching_hidden(hidden):
                row.fork(prefix_owner)
        else:
            passes, more = row.prefill(self._reader), True
            while more:
                with self._target.watching_hidden(hidden):
                    more = next(passes, self) is not self
                if more:
                    yield
        self.rows.append(row)

    def leave(self) -> list[Row]:
        """Takes out the rows that are done, each ready to be returned."""
        done = [row for row in self.rows if row.done]
        if done:
            began = perf_counter()
            self._apply_feedback()
            self._stats.learn_seconds += perf_counter() - began
            done = [row for row in self.rows if row.done]
            self.rows = [row for row in self.rows if not row.done]
            done = list(self._of_each(Row.finish, done))
            for row in done:
                row.forget()
        return done

    def remove(self, row: Row) -> None:
        """Takes out a row that was aborted, between two steps."""
        self.rows = [other for other in self.rows if other is not row]
        row.forget()

    def step(self) -> Step:
        """Drafts, verifies and accepts in every row."""
        stats = self._stats
        started = perf_counter()
        if self._learns_late:
            self._of_each(Row.observe, self.rows)
        else:
            self._apply_feedback()
        learnt = perf_counter()
        planned = self._plan()
        drafted = perf_counter()
        wanted = reduce(Wanted.joined, (row.wanted for row in planned), Wanted())
        self._wanted = self._target.summarised_for(self._reader.k, wanted)
        prepared = self._prepare(planned)
        self._of_each(Row.prepare_drafts, list(prepared), [planned[row] for row in prepared])
        packed = perf_counter()
        verified = self._verify_groups(prepared, planned)
        outputs = {row: output for each in verified for row, output in each.outputs.items()}
        if self._learns_late:  # a row may have failed meanwhile
            outputs = {row: output for row, output in outputs.items() if row in self.rows}
        emitted: dict[Row, list[int]] = self._of_each(_accept, list(outputs), list(outputs.values()))
        ended = perf_counter()
        rows = list(emitted)
        step = Step(
            rows=rows,
            plans=[outputs[row].plan for row in rows],
            emitted=list(emitted.values()),
            learn_seconds=learnt - started,
            draft_seconds=drafted - learnt,
            commit_seconds=packed - drafted,
            forward_seconds=sum(each.seconds for each in verified),
            seconds=ended - started,
        )
        if len(verified) == 1 and rows and verified[0].is_usual:
            self._costs = _StepCosts(
                rows=len(outputs),
                nodes=verified[0].nodes,
                length=max(row.length for row in rows),
                emitted=sum(map(len, step.emitted)),
                forward_seconds=step.forward_seconds,
                seconds=step.seconds,
            )
        stats.passes += len(verified)
        stats.learn_seconds += step.learn_seconds
        stats.draft_seconds += step.draft_seconds
        stats.commit_seconds += step.commit_seconds
        stats.forward_seconds += step.forward_seconds
        stats.accept_seconds += ended - packed - step.forward_seconds
        return step

    def _apply_feedback(self) -> None:
        """Updates sources, calibration and costs with the result of the last step, once."""
        self._of_each(Row.apply_feedback, self.rows)
        costs, self._costs = self._costs, None
        if costs is not None:
            self._budget.timed(costs.rows, costs.nodes, costs.length, costs.forward_seconds)
            self._budget.note_step(costs.rows, costs.emitted, costs.seconds, costs.forward_seconds)

    def _plan(self) -> dict[Row, DraftPlan]:
        """The trees to verify: every row's proposals, cut to its share of the budget."""
        planned: dict[Row, DraftPlan] = self._of_each(Row.propose, self.rows)
        trees, lengths = [plan.tree for plan in planned.values()], [row.length for row in planned]
        if self._target.shares_passes:
            graphs = self._target.graphs
            padded = () if graphs is None else graphs.sizes(len(trees))
            sizes = self._budget.share(trees, lengths, padded)
        else:
            sizes = self._budget.alone(trees, lengths, [row.carried for row in planned])
        return {
            row: plan.cut(size).weighed(self._budget)
            for (row, plan), size in zip(planned.items(), sizes, strict=True)
        }

    def _prepare(self, planned: Mapping[Row, DraftPlan]) -> dict[Row, TreeInputs]:
        """Trees on the device, and accepted paths in place: of all rows at once for a captured pass."""
        rows, plans = list(planned), list(planned.values())
        graphs = self._target.graphs
        trees = None
        if graphs is not None and len(rows) > 1:
            most = max(len(plan.tree) for plan in plans)
            trees = graphs.begin_rows([row.cache for row in rows], [row.length for row in rows], most)
        if graphs is None or trees is None:
            return self._of_each(Row.prepare, rows, plans)
        packed = list(self._of_each(Row.pack, rows, plans, [trees] * len(rows)))
        if not graphs.send_rows(trees):
            return self._of_each(Row.prepare, packed, [planned[row] for row in packed])
        return self._of_each(Row.packed, packed, [trees] * len(packed))

    def _of_each(
        self, call: Callable[..., Any], rows: Sequence[Row], *given: Sequence[Any]
    ) -> dict[Row, Any]:
        """Results of `call` for each row; a row in which it raises fails alone."""
        out: dict[Row, Any] = {}
        for row, *arguments in zip(rows, *given, strict=True):
            try:
                out[row] = call(row, *arguments)
            except Exception as error:
                self._fail(row, error)
        return out

    def _fail(self, row: Row, error: Exception) -> None:
        if self._failed is None:
            raise error
        self.remove(row)
        self._failed(row, error)

    def _verify_groups(
        self, inputs: Mapping[Row, TreeInputs], plans: Mapping[Row, DraftPlan]
    ) -> list[_Verified]:
        """A pass over all rows, or one over each group of rows that can share a pass."""
        verified: list[_Verified] = []
        groups = self._shared(list(inputs))
        for group in groups:
            trees = [plans[row] for row in group]
            try:
                done = self._verify(group, trees, [inputs[row] for row in group])
                verified.append(done if len(groups) == 1 else done.with_own_logits())
            except Exception as error:
                if self._failed is None:
                    raise
                verified += self._verify_alone(group, trees, error)
        return verified

    def _shared(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """Groups of rows that share a pass: one of all rows, unless their rotary factors differ."""
        if not self._target.shares_passes:
            return [[row] for row in rows]
        rope = self._target.rope
        if rope is not None:
            return [[rows[at] for at in group] for group in rope.shared([row.length for row in rows])]
        return [rows] if rows else []

    def _verify(
        self, rows: Sequence[Row], plans: Sequence[DraftPlan], inputs: Sequence[TreeInputs]
    ) -> _Verified:
        """One pass over the trees of all rows, and its predictions."""
        repeated = sum(row.carried or 0 for row in rows)
        captures = self._target.captures
        began = perf_counter()
        wants_hidden = any(row.drafting is not None and row.drafting.wants_hidden for row in rows)
        with self._target.watching_hidden(wants_hidden):
            logits = self._target.verify_rows([row.cache for row in rows], inputs)
            hidden = self._target.hidden if wants_hidden else None
        launched = perf_counter()
        if self._learns_late:
            self._apply_feedback()
        begins = self._target.begins(logits, inputs)
        ends = [begin + given.input_ids.shape[1] for begin, given in zip(begins, inputs, strict=True)]
        read = self._read(logits, begins, [len(plan.tree) for plan in plans])
        # On CUDA the pass is over when its logits have been read; nothing else waits for it.
        ended = perf_counter() if self._learns_late else launched
        if len(rows) == 1:
            outputs = {rows[0]: _RowOutput(plans[0], logits, read[0][0], hidden, read[0][1])}
        else:
            outputs = {
                row: _RowOutput(
                    plan, logits[begin:end], each, None if hidden is None else hidden[begin:end], some
                )
                for row, plan, (each, some), begin, end in zip(rows, plans, read, begins, ends, strict=True)
            }
        is_usual = captures == self._target.captures
        return _Verified(outputs, repeated + len(logits), ended - began, is_usual)

    def _read(
        self, logits: Tensor, begins: Sequence[int], nodes: Sequence[int]
    ) -> list[tuple[Predictions, BestLogits | None]]:
        """Summaries of each row's part of the logits, in one copy; padded nodes left out."""
        made = self._target.summary_of(logits)
        if len(nodes) == 1:
            return [self._reader.read_with_best(logits, nodes[0], self._wanted, made)]
        whole, some = self._reader.read_with_best(logits, None, self._wanted, made)
        parts = [slice(begin, begin + size) for begin, size in zip(begins, nodes, strict=True)]
        return [
            (
                Predictions(*(getattr(whole, name)[part] for name in Predictions.__slots__)),
                None if some is None else some.part(part),
            )
            for part in parts
        ]

    def _verify_alone(
        self, rows: Sequence[Row], plans: Sequence[DraftPlan], error: Exception
    ) -> list[_Verified]:
        """A pass for each row, after one over all of them raised; the rows that raise again fail."""
        _log.warning("A pass over %d rows raised and is made again row by row: %r", len(rows), error)
        out = []
        for row, plan in zip(rows, plans, strict=True):
            plain = plan.cut(0)
            try:
                out.append(self._verify([row], [plain], [row.prepare_again(plain)]).with_own_logits())
            except Exception as again:
                self._fail(row, again)
        return out

    def close(self) -> None:
        """Closes the rows' drafting, as after an error."""
        for row in self.rows:
            row.forget()
        self.rows = []


def decode(
    target: Target,
    requests: Sequence[DecodeRequest],
    reader: LogitReader,
    stats: DraftStats,
    draftings: Sequence[DraftSession | None] = (),
    budget: Budget | None = None,
    each: Sequence[DraftStats] = (),
) -> list[Row]:
    """Decodes requests together until all are done; those that end early leave the batch.

    Args:
        target: The model.
        requests: Requests to decode. A `prefix_owner` comes before those that name it.
        reader: Reads logits; its `k` is the number of alternatives that the sources learn from.
        stats: Gets the counts that the rows share.
        draftings: The drafting of each request; None for one token a step. Closed here.
        budget: Splits draft nodes between rows; without one all of a tree is verified.
        each: Counts of each request; `stats` without.

    Returns:
        The finished rows, in the order of the requests: their texts and caches.
    """
    batch = Batch(target, reader, stats, budget if budget is not None else Budget())
    rows: dict[DecodeRequest, Row] = {}
    drafted: Sequence[DraftSession | None] = draftings or [None] * len(requests)
    try:
        for index, (request, drafting) in enumerate(zip(requests, drafted, strict=True)):
            prefix_owner = None if request.prefix_owner is None else rows[request.prefix_owner]
            rows[request] = batch.join(request, drafting, each[index] if each else stats, prefix_owner)
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
