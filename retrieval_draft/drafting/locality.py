"""The hierarchy of draft sources, nearest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from retrieval_draft.index.source import DraftSession, DraftSource, NodeLogits, Proposal, TokenArray

__all__ = ["Locality", "RequestDrafts", "open_siblings", "wants_hidden"]

CERTAIN = 0.5
"""A source that gives all of its nodes together this probability leaves no room for others."""


class RequestDrafts:
    """Every source's session of one request, asked together."""

    def __init__(self, sessions: Sequence[DraftSession]) -> None:
        self._sessions = tuple(sessions)

    def propose(self, budget: int) -> list[Proposal]:
        """One proposal of at most `budget` nodes from each source, in their order; empty ones too.

        The order is what fusion and calibration know a source by, so it is the same at every step. Where a
        near source is almost certain of the whole budget, those further away are not asked.
        """
        if budget <= 0:
            return []
        proposals: list[Proposal] = []
        enough = False
        for session in self._sessions:
            proposals.append(session.propose(0 if enough else budget))
            enough = enough or _fills(proposals[-1], budget)
        return proposals

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens to the text of every source."""
        for session in self._sessions:
            session.observe(tokens)

    def learn(self, logits: NodeLogits) -> None:
        """Hands the target's predictions at verified nodes to every source."""
        for session in self._sessions:
            session.learn(logits)

    @property
    def wants_hidden(self) -> bool:
        """Whether a session drafts from the target's hidden states."""
        return any(wants_hidden(session) for session in self._sessions)

    def learn_hidden(self, hidden: Any) -> None:
        """Hands the hidden state that chose the new root to the sessions that draft from it."""
        for session in self._sessions:
            if wants_hidden(session):
                head: Any = session
                head.learn_hidden(hidden)

    def close(self) -> None:
        """Ends the request in every source."""
        for session in self._sessions:
            session.close()


def open_siblings(
    source: DraftSource, prompt: TokenArray, references: Sequence[TokenArray], count: int
) -> list[DraftSession]:
    """A source's sessions of `count` requests with one prompt; it may have a way of its own to open them."""
    together: Any = getattr(source, "open_siblings", None)
    if together is not None and count > 1:
        return list(together(prompt, references, count))
    return [source.open(prompt, references) for _ in range(count)]


def wants_hidden(session: object) -> bool:
    """Whether a session has `learn_hidden` and a use for it."""
    return bool(getattr(session, "wants_hidden", False))


def _fills(proposal: Proposal, budget: int) -> bool:
    """Whether a proposal has `budget` nodes and takes all of them together for likely."""
    return len(proposal) == budget and float(proposal.probs.prod()) >= CERTAIN


class Locality:
    """Draft sources in order of locality, opened together for a request.

    Args:
        sources: Nearest first.
    """

    def __init__(self, sources: Sequence[DraftSource]) -> None:
        self.sources = tuple(sources)

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> RequestDrafts:
        """Starts a request in every source.

        Args:
            prompt: int32, shape (length,).
            references: Texts that the reply may quote.
        """
        return RequestDrafts([source.open(prompt, references) for source in self.sources])

    def open_siblings(
        self, prompt: TokenArray, references: Sequence[TokenArray], count: int
    ) -> list[RequestDrafts]:
        """Starts `count` requests with one prompt, which draft from each other's replies where a source can.

        Args:
            prompt: int32, shape (length,).
            references: Texts that the replies may quote.
            count: How many.
        """
        opened = [open_siblings(source, prompt, references, count) for source in self.sources]
        return [RequestDrafts([sessions[each] for sessions in opened]) for each in range(count)]

    def flush(self) -> None:
        """Waits until what finished requests said can be looked up in every source."""
        for source in self.sources:
            source.flush()

    def close(self) -> None:
        """Ends every source: what waits is kept, background threads stop."""
        for source in self.sources:
            source.close()

    @property
    def nbytes(self) -> int:
        """Bytes held by all sources, sessions excluded."""
        return sum(source.nbytes for source in self.sources)
