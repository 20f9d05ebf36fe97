"""Calls to a costly source only while they pay."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from retrieval_draft.drafting.hierarchy import wants_hidden
from retrieval_draft.index.source import (
    DraftSource,
    NodeLogits,
    Proposal,
    SourceSession,
    TokenArray,
    empty_proposal,
)

__all__ = ["PacedSource", "Pacer"]

TRIAL = 8
"""Steps in which an arm is tried before the two are compared."""

MEMORY = 0.97
"""Decay factor of an arm's sums at each of its steps."""

MARGIN = 1.02
FIRST_WAIT = 32
LAST_WAIT = 1024
"""Steps until the loser is tried again: doubled each time it loses again, up to the last."""


class Pacer:
    """Comparison of steps with and without a costly source by tokens a second.

    The measure is the whole step, so that it does not matter why one is better. Neither is dropped for good:
    the loser is tried again, at doubling intervals while it loses.

    Example:
        with: 3 tokens in 0.2 s a step, without: 2 in 0.1 s; after 8 steps of each it goes without, and
        tries again after 32 steps, then 64, ...
    """

    def __init__(self) -> None:
        self._tokens = [0.0, 0.0]
        self._seconds = [0.0, 0.0]
        self._arm = 1
        self._left = TRIAL
        self._tries = 0
        self._wait = FIRST_WAIT

    @property
    def asks(self) -> bool:
        """True if the source is called in the next step."""
        return self._arm == 1

    def rate(self, asked: bool) -> float:
        """Tokens a second with or without the source, 0 where unknown."""
        return self._tokens[asked] / self._seconds[asked] if self._seconds[asked] > 0 else 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """Counts a step of the present kind."""
        arm = self._arm
        self._tokens[arm] = self._tokens[arm] * MEMORY + tokens
        self._seconds[arm] = self._seconds[arm] * MEMORY + seconds
        self._left -= 1
        if self._left > 0:
            return
        self._tries += 1
        if self._tries == 1:  # the other arm's first trial
            self._arm, self._left = 0, TRIAL
            return
        best = int(self.rate(True) * MARGIN >= self.rate(False))
        if self._tries % 2 == 0:  # a trial of the present loser has ended
            self._wait = min(self._wait * 2, LAST_WAIT) if best != arm and self._tries > 2 else FIRST_WAIT
            self._arm, self._left = best, self._wait
        else:
            self._arm, self._left = 1 - arm, TRIAL


class _PacedSession:
    def __init__(self, source: PacedSource, session: SourceSession, clock: Callable[[], float]) -> None:
        self._source = source
        self._session = session
        self._pacer = source.pacer
        self._clock = clock
        self._begin: float | None = None
        self._emitted = 0

    def propose(self, budget: int) -> Proposal:
        now = self._clock()
        if self._begin is not None:
            self._pacer.note(self._emitted, now - self._begin)
        self._begin, self._emitted = now, 0
        if self._pacer.asks:
            return self._session.propose(budget)
        return empty_proposal(self._source.name, self._source.level)

    def observe(self, tokens: TokenArray) -> None:
        self._emitted += len(tokens)
        self._session.observe(tokens)

    def learn(self, logits: NodeLogits) -> None:
        self._session.learn(logits)

    @property
    def wants_hidden(self) -> bool:
        return wants_hidden(self._session)

    def learn_hidden(self, hidden: Any, begin: int) -> None:
        session: Any = self._session
        session.learn_hidden(hidden, begin)

    @property
    def wants_cache(self) -> bool:
        return bool(getattr(self._session, "wants_cache", False))

    def lend_cache(self, cache: Any) -> None:
        session: Any = self._session
        session.lend_cache(cache)

    def fork(self, owner: _PacedSession) -> None:
        session: Any = self._session
        session.fork(owner._session)

    def close(self) -> None:
        self._session.close()


class PacedSource:
    """A draft source that is called only in steps where it pays.

    Args:
        source: The source.
        clock: Returns seconds.
    """

    def __init__(self, source: DraftSource, clock: Callable[[], float] = time.perf_counter) -> None:
        self.source = source
        self.name = source.name
        self.level = source.level
        self.pacer = Pacer()
        self._clock = clock

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SourceSession:
        """Starts a request with `prompt`, int32, shape (length,); the comparison continues over requests."""
        return _PacedSession(self, self.source.open(prompt, references), self._clock)

    def prepare(self) -> None:
        """Runs the source's preparation before its first request."""
        prepare: Callable[[], None] | None = getattr(self.source, "prepare", None)
        if prepare is not None:
            prepare()

    def flush(self) -> None:
        """Waits until the replies of finished requests can be looked up."""
        self.source.flush()

    def close(self) -> None:
        """Ends the source."""
        self.source.close()

    @property
    def nbytes(self) -> int:
        """Bytes held by the source."""
        return self.source.nbytes
