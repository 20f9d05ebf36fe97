"""HTTP requests as jobs of the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from time import monotonic

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.row import Row
from retrieval_draft.generation.requests import DecodeRequests
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.detokenize import ReplyText
from retrieval_draft.server.openai.reply import Reply
from retrieval_draft.server.scheduler.channel import Channel

__all__ = ["Choice", "Job", "SequenceGroup"]


@dataclass(slots=True, eq=False)
class Choice:
    """One text to generate.

    Attributes:
        job: The job it belongs to.
        index: Index in the job.
        request: The decode request.
        stats: Its counts.
        row: Its row in the batch, while it has one.
        sent: Tokens that the client has been sent.
        first: Time of the first token; 0 before.
        over: Whether it has ended, for any reason.
        text: Its text, in which stop strings are looked for; None without any.
        accepted_steps: Number of steps with drafts by the number of accepted ones.
    """

    job: Job
    index: int
    request: DecodeRequest
    stats: DraftStats = field(default_factory=DraftStats)
    row: Row | None = None
    sent: int = 0
    first: float = 0.0
    over: bool = False
    text: ReplyText | None = None
    accepted_steps: Counter[int] = field(default_factory=Counter)


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """Choices of one prompt, which join together.

    Attributes:
        job: The job it belongs to.
        prepared: The drafter's prepared requests.
        choices: The leader first.
    """

    job: Job
    prepared: DecodeRequests
    choices: list[Choice]


@dataclass(slots=True, eq=False)
class Job:
    """One HTTP request: its prompts, the choices that the engine decodes, and the replies to its client.

    Attributes:
        id: Of the request, the server's own.
        tenant: Its tenant.
        drafter: The tenant's.
        channel: Receives its tokens.
        seconds: Time after which it is aborted.
        arrived: Time of arrival, on the monotonic clock.
        traceparent: W3C's header of the HTTP request, for traces; None without.
        client_id: The client's id of the request, for logs; None without.
        priority: Requests of its tenant with lower numbers join before it.
        grammar_field: The field that asks for the grammar of its replies; None without one.
        replies: One for each choice, in order.
        prompt_tokens: Of all prompts.
        predicted: Token ids of the prediction.
        groups: One for each prompt; none before `begin`, and once it is over.
        prompts: Number of prompts.
        size: Choices in all.
        given_up: Error that ends it early; None if there is none.
        failed: Whether that is the error of a row of it, which its client has been told.
        ended: Choices that are over.
    """

    id: str
    tenant: str
    drafter: RetrievalDrafter
    channel: Channel
    seconds: float
    arrived: float = field(default_factory=monotonic)
    traceparent: str | None = None
    client_id: str | None = None
    priority: int = 0
    grammar_field: str | None = None
    replies: list[Reply] = field(default_factory=list)
    prompt_tokens: int = 0
    predicted: Sequence[int] = ()
    groups: list[SequenceGroup] = field(default_factory=list)
    prompts: int = 0
    size: int = 0
    given_up: ApiError | None = None
    failed: bool = False
    ended: int = 0
    _prepared: list[tuple[DecodeRequests, Sequence[ReplyText | None]]] = field(default_factory=list)

    def add(self, prepared: DecodeRequests, texts: Sequence[ReplyText | None] | None = None) -> None:
        """Adds a prompt.

        Args:
            prepared: Its requests, one for each choice.
            texts: Their texts, in which stop strings are looked for; None without any.
        """
        self._prepared.append((prepared, texts or [None] * len(prepared.requests)))
        self.prompts += 1
        self.size += len(prepared.requests)

    def begin(self) -> None:
        """Makes the choices.

        They know the job, and what is in a circle waits for a collection: not before the engine has them, as
        the client may leave before, and not after `release`.
        """
        index = count()
        for prepared, texts in self._prepared:
            pairs = zip(prepared.requests, texts, strict=True)
            choices = [Choice(self, next(index), request, text=text) for request, text in pairs]
            self.groups.append(SequenceGroup(self, prepared, choices))

    def release(self) -> None:
        """Forgets the choices at the end, and with them the inputs and the keys of each request."""
        self.groups, self._prepared = [], []

    @property
    def choices(self) -> list[Choice]:
        """Choices of all groups."""
        return [choice for group in self.groups for choice in group.choices]
