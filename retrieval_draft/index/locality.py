"""The hierarchy of draft sources, nearest first."""

from __future__ import annotations

from collections.abc import Sequence

from retrieval_draft.index.source import DraftSession, DraftSource, NodeLogits, Proposal, TokenArray, Trunk

__all__ = ["Locality", "RequestDrafts"]


class RequestDrafts:
    """Every source's session of one request, asked together."""

    def __init__(self, sessions: Sequence[DraftSession]) -> None:
        self._sessions = tuple(sessions)

    @property
    def several(self) -> bool:
        """Whether there is more than one source, so that they can extend each other's proposals."""
        return len(self._sessions) > 1

    def propose(self, budget: int, trunk: Trunk | None = None) -> list[Proposal]:
        """One proposal from each source that has something to say.

        Args:
            budget: The most nodes a source may add.
            trunk: What they found together in a first round, to be judged and extended by all.
        """
        if budget <= 0:
            return []
        proposals = [session.propose(budget, trunk) for session in self._sessions]
        return [proposal for proposal in proposals if len(proposal)]

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens to the text of every source."""
        for session in self._sessions:
            session.observe(tokens)

    def learn(self, logits: NodeLogits) -> None:
        """Hands the target's predictions at verified nodes to every source."""
        for session in self._sessions:
            session.learn(logits)

    def close(self) -> None:
        """Ends the request in every source."""
        for session in self._sessions:
            session.close()


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

    @property
    def nbytes(self) -> int:
        """Bytes held by all sources, sessions excluded."""
        return sum(source.nbytes for source in self.sources)
