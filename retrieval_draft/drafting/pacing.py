"""Calls to a costly source only in the steps in which they pay."""

from __future__ import annotations

import time
from bisect import bisect
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from weakref import WeakSet

from retrieval_draft.drafting.hierarchy import OuterSession
from retrieval_draft.index.source import DraftSource, NodeLogits, Proposal, SourceSession, TokenArray

__all__ = ["PacedSource", "Pacer"]

EDGES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
"""Expected tokens of a step by the other sources, between which its gain is learned apart."""

TRIAL = 8
"""Calls before the source is known. All of them are trials, and the first one's time, in which code is loaded
and a prompt read, is not counted."""

PRIOR = 2.0
"""Weight of the gain of all steps in that of a kind of step, in steps."""

MEMORY = 0.97
"""Decay factor of a kind's sums at each step in which the source was asked."""

RATE_MEMORY = 0.995
"""Decay factor of tokens and seconds at each step."""

PRICES = 15
"""Calls whose median time is the price; so the first of a request, which reads the prompt, is not."""

MARGIN = 1.3
"""Gain at which the source is asked, over its price. Gains are learned from few steps: where one is taken for
higher than it is the source is asked, where for lower it is not, so at the price itself asking loses."""

FIRST_WAIT = 16
LAST_WAIT = 1024
"""Steps of a kind until a source that sleeps in it is tried again: doubled each time, up to the last."""

SHARE = 0.005
"""Share of all time that such trials may lose."""


class _Kind:
    """Steps in which the other sources expect as much: the costly one's gain, and its next trial."""

    def __init__(self) -> None:
        self.gained = self.weight = 0.0
        self.wait, self.slept = FIRST_WAIT, 0


class Pacer:
    """Comparison of a costly source's expected gain with its measured price, step by step.

    The gain is the number of accepted tokens beyond those that the tree of the other sources would have had
    accepted, which is known after each step in which the source was asked. It is learned by what the others
    expect of the step, so that the source sleeps where they are certain. The price is its time and that of a
    longer pass over its drafts, in tokens of the present speed.

    Args:
        clock: Returns seconds.

    Attributes:
        calls: Steps in which the source was asked.

    Example:
        a head adds 1.2 tokens where lookups expect less than one, and 0.1 where they copy a long passage; it
        takes 5 ms, in which 0.3 tokens are emitted: it is asked in the former steps and sleeps in the latter
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._kinds = [_Kind() for _ in range(len(EDGES) + 1)]
        self._all = _Kind()
        self._prices: deque[float] = deque(maxlen=PRICES)
        self._tokens = self._seconds = 0.0
        self._total = self._lost = 0.0
        self._last: float | None = None
        self._is_trial = False
        self.calls = 0

    @property
    def rate(self) -> float:
        """Tokens a second of recent steps; 0 where unknown."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    @property
    def price(self) -> float:
        """Seconds of a call; 0 where unknown."""
        return median(self._prices) if self._prices else 0.0

    def gain(self, expected: float) -> float:
        """Tokens that the source adds to a step of which the others expect so many."""
        kind, every = self._kinds[bisect(EDGES, expected)], self._all
        overall = every.gained / every.weight if every.weight else 0.0
        return (kind.gained + PRIOR * overall) / (kind.weight + PRIOR)

    def asks(self, expected: float) -> bool:
        """True if the source is asked in a step of which the others expect `expected` accepted tokens."""
        now = self._clock()
        if self._last is not None:
            passed = now - self._last
            self._seconds = self._seconds * RATE_MEMORY + passed
            self._tokens *= RATE_MEMORY
            self._total += passed
        self._last, self._is_trial = now, False
        kind, is_known = self._kinds[bisect(EDGES, expected)], self.calls >= TRIAL
        if is_known and self.gain(expected) > MARGIN * self.price * self.rate:
            kind.wait, kind.slept = FIRST_WAIT, 0
        else:
            kind.slept += 1
            if (is_known and kind.slept < kind.wait) or self._lost > SHARE * self._total:
                return False
            if is_known:
                kind.wait, kind.slept = min(2 * kind.wait, LAST_WAIT), 0
            self._is_trial = True
        self.calls += 1
        return True

    def took(self, seconds: float) -> None:
        """Records the time of a call."""
        self._prices.append(seconds)
        if self._is_trial and self.calls > 1:
            self._lost += seconds

    def lengthened(self, seconds: float) -> None:
        """Adds to the last call's time what the target's pass took longer over the tree with its drafts."""
        if self._prices:
            self._prices[-1] += seconds
            if self._is_trial:
                self._lost += seconds

    def added(self, expected: float, tokens: float) -> None:
        """Records the accepted tokens that a call has added to a step's; they may be fewer than none."""
        mine = self._kinds[bisect(EDGES, expected)]
        for kind in (mine, self._all):
            kind.gained = kind.gained * MEMORY + tokens
            kind.weight = kind.weight * MEMORY + 1
        if (mine.wait > FIRST_WAIT or self.calls <= TRIAL) and self.rate:  # it was a trial
            self._lost = max(self._lost - tokens / self.rate, 0.0)
            if tokens > self.price * self.rate:
                mine.slept = mine.wait  # which continues while it succeeds

    def emitted(self, tokens: int) -> None:
        """Records tokens of a step."""
        self._tokens += tokens

    def pause(self) -> None:
        """Has the time until the next step not counted: no request is running."""
        self._last = None


class _PacedSession(OuterSession):
    """One request in a source that is asked in some steps only; drafts nothing unless asked."""

    def __init__(self, source: PacedSource, session: SourceSession, clock: Callable[[], float]) -> None:
        self._source = source
        self._session = session
        self.inner = (session,)
        self._clock = clock
        self.pacer = source.pacer

    is_paced = True

    def propose(self, budget: int) -> Proposal:
        begin = self._clock()
        proposal = self._session.propose(budget)
        # One that drafts for several requests at once knows each one's share.
        share: float | None = getattr(self._session, "draft_seconds", None)
        self.pacer.took(self._clock() - begin if share is None else share)
        return proposal

    def observe(self, tokens: TokenArray) -> None:
        self.pacer.emitted(len(tokens))
        self._session.observe(tokens)

    def learn(self, logits: NodeLogits) -> None:
        self._session.learn(logits)

    def close(self) -> None:
        self._source.ended(self)
        self._session.close()


class PacedSource:
    """A draft source that is asked only in steps where it pays, after all others.

    Args:
        source: The source.
        clock: Returns seconds.
    """

    def __init__(self, source: DraftSource, clock: Callable[[], float] = time.perf_counter) -> None:
        self.source = source
        self.name = source.name
        self.level = source.level
        self.pacer = Pacer(clock)
        self._clock = clock
        self._live: WeakSet[_PacedSession] = WeakSet()

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SourceSession:
        """Starts a request with `prompt`, int32, shape (length,); what was learned stays for the next."""
        session = _PacedSession(self, self.source.open(prompt, references), self._clock)
        self._live.add(session)
        return session

    def ended(self, session: _PacedSession) -> None:
        """Notes that a request has ended."""
        self._live.discard(session)
        if not self._live:
            self.pacer.pause()

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
