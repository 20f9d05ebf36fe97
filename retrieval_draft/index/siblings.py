"""Several replies to one prompt, decoded in parallel: each drafts from the others' text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retrieval_draft.config import DraftConfig
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.index.source import BaseSession, BaseSource, Proposal, TokenArray, empty_proposal
from retrieval_draft.index.suffix_automaton import SuffixAutomaton

__all__ = ["SiblingSession", "SiblingSource", "make_source"]

LED_TO = 32
"""Tokens of the prompt before each reply, so that its first tokens have a context."""


class SiblingSession(BaseSession):
    """One reply among several, in an automaton that holds all of them.

    Args:
        automaton: Its current text is the end of the prompt. None for a request that is alone.
    """

    def __init__(self, automaton: SuffixAutomaton | None) -> None:
        self._automaton = automaton
        self._state = 0 if automaton is None else automaton.state
        self._workspace = None if automaton is None else SuffixAutomaton.workspace()

    def propose(self, budget: int) -> Proposal:
        """The tokens after the reply's last tokens in any of the replies, as a tree."""
        if self._automaton is None or self._workspace is None:
            return empty_proposal(SiblingSource.name, SiblingSource.level)
        self._automaton.state = self._state
        proposal = self._automaton.propose(budget, self._workspace)
        return replace(proposal, source=SiblingSource.name, level=SiblingSource.level)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,); the others can draft from them at once."""
        if self._automaton is not None:
            self._automaton.state = self._state
            self._automaton.insert(tokens)
            self._state = self._automaton.state

    def close(self) -> None:
        """Keeps the text for the siblings that continue."""


class SiblingSource(BaseSource):
    """Drafts from other samples of the same prompt in the same call.

    Samples agree in parts, and counts over all of them show where: the consensus of parallel paths
    (arXiv:2503.05330) in one suffix automaton, which the replies extend in turns.

    Example:
        after the prompt 1 2 one sample is 3 4, another 3: the latter gets the draft 4
    """

    name = "siblings"

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SiblingSession:
        """Starts a request without siblings, for which this source proposes nothing; no argument is read."""
        return SiblingSession(None)

    def open_parallel(
        self, prompt: TokenArray, references: Sequence[TokenArray], count: int
    ) -> list[SiblingSession]:
        """Starts `count` requests with one prompt.

        Args:
            prompt: int32, shape (length,).
            references: int32 each. Not used: the request's own automaton holds them.
            count: Number of requests.
        """
        automaton = SuffixAutomaton()
        automaton.insert(prompt[-LED_TO:])
        return [SiblingSession(automaton) for _ in range(count)]


def make_source(config: DraftConfig, stores: DraftStores) -> SiblingSource:
    """A source over the samples of a prompt."""
    return SiblingSource()
