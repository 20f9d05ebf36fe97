"""Events of the serving engine for its listeners: metrics, the dashboard, traces."""

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
        index: Index among the request's choices.
        tenant: From the API key; "default" without keys.
        prompt_tokens: Length of the prompt.
        queued_seconds: Time it waited to join the batch.
        prefill_seconds: Time of the prompt's pass, to the first token.
        traceparent: W3C's header of the HTTP request, for traces; None without.
        cached_tokens: Tokens of the prompt whose keys were kept from earlier texts.
    """

    request_id: str
    index: int
    tenant: str
    prompt_tokens: int
    queued_seconds: float
    prefill_seconds: float
    traceparent: str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RowStep:
    """Result of one row in a step.

    Attributes:
        request_id: Of the HTTP request.
        index: Index among its choices.
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
        learn_seconds: Updates of sources and calibration.
        seconds: The whole step.
        plain_seconds: Measured time of a pass over one token a row; 0 where that is not known.
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
    """A choice that is complete, or was aborted.

    Attributes:
        request_id: Of the HTTP request.
        index: Index among its choices.
        tenant: From the API key; "default" without keys.
        reason: "stop", "length", "abort" (the client left, a time limit, shutdown) or "error".
        prompt_tokens: Length of the prompt.
        completion_tokens: Tokens of the reply.
        first_token_seconds: From arrival to the first token; 0 where there was none.
        seconds: From arrival to the end.
        stats: Counts of this row.
        client_id: The client's id of the request, for logs; None without.
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
    """Listener on the engine's thread: its methods must return within microseconds, and never raise."""

    def queue_changed(self, waiting: int, running: int) -> None:
        """Receives the number of waiting requests, and of rows in the batch."""
        ...

    def request_started(self, start: RequestStart) -> None:
        """Receives a row that joined the batch."""
        ...

    def step(self, report: StepReport) -> None:
        """Receives a verified forward pass."""
        ...

    def request_ended(self, end: RequestEnd) -> None:
        """Receives a choice that is complete or aborted."""
        ...
