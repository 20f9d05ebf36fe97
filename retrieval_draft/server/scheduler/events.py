"""What the serving engine tells those who watch it: metrics, the dashboard, traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from retrieval_draft.drafting.session import DraftPlan
from retrieval_draft.drafting.stats import DraftStats

__all__ = ["EngineListener", "RequestEnd", "RequestStart", "RowStep", "StepReport"]


@dataclass(frozen=True, slots=True)
class RequestStart:
    """A row that joined the batch.

    Attributes:
        request_id: Of the HTTP request; its samples share it.
        index: Which of the request's choices.
        tenant: From the API key; "default" without keys.
        prompt_tokens: Length of the prompt.
        queued_seconds: How long it waited for a place in the batch.
        prefill_seconds: How long the prompt's pass took, to the first token.
        traceparent: W3C's header of the HTTP request, for traces; None without.
    """

    request_id: str
    index: int
    tenant: str
    prompt_tokens: int
    queued_seconds: float
    prefill_seconds: float
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class RowStep:
    """What one row did in a step.

    Attributes:
        request_id: Of the HTTP request.
        index: Which of its choices.
        plan: The tree that was verified, and the proposals that named its nodes.
        path: Nodes of ``plan.tree`` that were accepted, the root (0) first.
        tokens: Emitted tokens, the bonus token last.
    """

    request_id: str
    index: int
    plan: DraftPlan
    path: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One forward pass over all rows.

    Attributes:
        rows: One entry for each row of the batch.
        draft_seconds: Proposals, fusion, choice of the budget.
        forward_seconds: The pass.
        commit_seconds: Packing and moving the accepted path.
        learn_seconds: What sources and calibration took note of.
        seconds: The whole step.
        plain_seconds: What a pass over one token a row is measured to take; 0 where that is not known.
    """

    rows: Sequence[RowStep]
    draft_seconds: float
    forward_seconds: float
    commit_seconds: float
    learn_seconds: float
    seconds: float
    plain_seconds: float


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """A choice that is complete, or was given up.

    Attributes:
        request_id: Of the HTTP request.
        index: Which of its choices.
        tenant: From the API key; "default" without keys.
        reason: "stop", "length", "abort" (the client left, a time limit, shutdown) or "error".
        prompt_tokens: Length of the prompt.
        completion_tokens: Tokens of the reply.
        first_token_seconds: From arrival to the first token; 0 where there was none.
        seconds: From arrival to the end.
        stats: Counts of this row.
        client_id: What the client called the request, for logs; None without.
    """

    request_id: str
    index: int
    tenant: str
    reason: str
    prompt_tokens: int
    completion_tokens: int
    first_token_seconds: float
    seconds: float
    stats: DraftStats
    client_id: str | None = None


class EngineListener(Protocol):
    """Called on the engine's thread: must return within microseconds, and never raise."""

    def queue_changed(self, waiting: int, running: int) -> None:
        """Requests that wait for a place, and rows in the batch."""
        ...

    def request_started(self, start: RequestStart) -> None:
        """A row joined the batch."""
        ...

    def step(self, report: StepReport) -> None:
        """A forward pass was verified."""
        ...

    def request_ended(self, end: RequestEnd) -> None:
        """A choice is complete or given up."""
        ...
