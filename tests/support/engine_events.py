"""Reports of a serving engine, made by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from retrieval_draft.drafting.session import DraftPlan
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.index.source import Proposal
from retrieval_draft.server.scheduler.events import RequestEnd, RequestStart, RowStep, StepReport


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def proposal(source: str, level: str) -> Proposal:
    return Proposal(ints(9), ints(-1), np.ones(1, np.float32), ints(1), source, level)


def plan() -> DraftPlan:
    """Root 8 with 9 above 4, and 3: the first two named by history too."""
    probs = np.array([1, 0.8, 0.4, 0.1], np.float32)
    tree = DraftTree(
        ints(8, 9, 4, 3), ints(-1, 0, 1, 0), ints(0, 1, 2, 1), probs, probs, np.array([0, 3, 2, 1], np.int64)
    )
    return DraftPlan(tree, tree, (proposal("automaton", "request"), proposal("history", "history")))


def empty_plan() -> DraftPlan:
    root = DraftTree.root(8)
    return DraftPlan(root, root, ())


def row(request: str = "r", path: Sequence[int] = (0, 1, 2), index: int = 0) -> RowStep:
    tokens = [int(plan().tree.tokens[node]) for node in path[1:]]
    return RowStep(request, index, plan(), path, [*tokens, 7])


def report(*rows: RowStep, seconds: float = 0.1, plain: float = 0.08) -> StepReport:
    return StepReport(rows, 0.001, 0.09, 0.002, 0.003, seconds, plain)


def started(request: str = "r", tenant: str = "default", **fields: object) -> RequestStart:
    return RequestStart(request, 0, tenant, 12, 0.5, 0.25, **fields)  # type: ignore[arg-type]


def ended(request: str = "r", reason: str = "stop", tenant: str = "default") -> RequestEnd:
    stats = DraftStats(requests=1, tokens=4, steps=1, drafted=3, accepted=2, source_failures=1)
    stats.drafted_by_source = Counter(automaton=2, history=2)
    stats.drafted_by_level = Counter(request=2, history=2)
    stats.accepted_by_source = Counter(automaton=1, history=2)
    stats.accepted_by_level = Counter(request=1, history=2)
    return RequestEnd(request, 0, tenant, reason, 12, 4, 0.75, 1.5, stats)
