"""Draft sources that may fail without failing the generation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from retrieval_draft.drafting.locality import open_siblings, wants_hidden
from retrieval_draft.index.source import (
    DraftSession,
    DraftSource,
    NodeLogits,
    Proposal,
    TokenArray,
    empty_proposal,
)

__all__ = ["GuardedSource"]

_T = TypeVar("_T")
_log = logging.getLogger("retrieval_draft")


class _GuardedSession:
    """A session that is left out for the rest of its request once it has raised."""

    def __init__(self, source: GuardedSource, session: DraftSession | None) -> None:
        self._source = source
        self._session = session

    def propose(self, budget: int) -> Proposal:
        empty = empty_proposal(self._source.name, self._source.level)
        return self._try("propose", lambda session: session.propose(budget), empty)

    def observe(self, tokens: TokenArray) -> None:
        self._try("observe", lambda session: session.observe(tokens), None)

    def learn(self, logits: NodeLogits) -> None:
        self._try("learn", lambda session: session.learn(logits), None)

    def learn_hidden(self, hidden: Any) -> None:
        session: Any = self._session
        if wants_hidden(session):
            self._try("learn_hidden", lambda _: session.learn_hidden(hidden), None)

    @property
    def wants_hidden(self) -> bool:
        return wants_hidden(self._session)

    def close(self) -> None:
        self._try("close", lambda session: session.close(), None)

    def _try(self, name: str, call: Callable[[DraftSession], _T], otherwise: _T) -> _T:
        if self._session is None:
            return otherwise
        try:
            return call(self._session)
        except Exception as error:  # a store that fails must not fail the generation
            self._session = None
            self._source.failed(name, error)
            return otherwise


class GuardedSource:
    """A draft source whose exceptions cost drafts, not the generation.

    Args:
        source: The source itself.

    Attributes:
        failures: Calls that raised so far.
    """

    def __init__(self, source: DraftSource) -> None:
        self.source = source
        self.name = source.name
        self.level = source.level
        self.failures = 0
        self._warned = False

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> DraftSession:
        """Opens the source; where that fails, a session that proposes nothing."""
        try:
            session: DraftSession | None = self.source.open(prompt, references)
        except Exception as error:  # as above
            session = None
            self.failed("open", error)
        return _GuardedSession(self, session)

    def open_siblings(
        self, prompt: TokenArray, references: Sequence[TokenArray], count: int
    ) -> list[DraftSession]:
        """Opens the source for requests with one prompt; where that fails, as `open` does."""
        try:
            sessions: list[DraftSession | None] = [*open_siblings(self.source, prompt, references, count)]
        except Exception as error:  # as above
            sessions = [None] * count
            self.failed("open", error)
        return [_GuardedSession(self, session) for session in sessions]

    def prepare(self) -> None:
        """What a source wants to do before its first request, such as measuring kernels."""
        prepare: Callable[[], None] | None = getattr(self.source, "prepare", None)
        if prepare is not None:
            try:
                prepare()
            except Exception as error:  # as above
                self.failed("prepare", error)

    def failed(self, call: str, error: Exception) -> None:
        """Counts a failure and warns the first time."""
        self.failures += 1
        if not self._warned:
            self._warned = True
            _log.warning(
                "Draft source %r raised in %s and is left out for this request: %r", self.name, call, error,
                exc_info=error,
            )  # fmt: skip

    def flush(self) -> None:
        """Waits until what finished requests said can be looked up."""
        self.source.flush()

    def close(self) -> None:
        """Ends the source."""
        self.source.close()

    @property
    def nbytes(self) -> int:
        """Bytes held by the source."""
        return self.source.nbytes
