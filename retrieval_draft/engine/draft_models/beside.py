"""Drafts of a model for the likeliest outcomes of the target's pass, made on another thread while it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from retrieval_draft.index.source import NodeLogits, Proposal, TokenArray, empty_proposal

__all__ = ["BesideSession", "DraftThread", "PreparesDrafts", "WayChoice"]

Result = TypeVar("Result")

MOST_WAITING = 64
"""Calls that wait for a session that is not asked; it takes them up beyond that."""

TURN = 16
"""Steps after which the way of drafting may change."""

COMPARED = 4
"""Turns at first in which both ways are taken one after the other."""

SELDOM = 16
"""Turns of which one is made in the way that was slower."""


class PreparesDrafts(Protocol):
    """Session of a draft model that can propose for text that the target has not written yet."""

    def propose(self, budget: int) -> Proposal:
        """Its most probable nodes after the text."""
        ...

    def propose_after(self, tokens: TokenArray, budget: int, stop: Callable[[], bool]) -> Proposal:
        """As `propose`, one level deeper, after the text and `tokens`, int32, which it does not keep.

        It may return anything once `stop` is true.
        """
        ...

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,)."""
        ...

    def learn(self, logits: NodeLogits) -> None:
        """Takes the target's predictions."""
        ...

    def close(self) -> None:
        """Ends the request."""
        ...


class WayChoice:
    """Comparison of the tokens a second with drafts made beside the target's passes and before them.

    Both ways take turns at first; then the faster one is taken, and the other tried again now and then.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
        self._steps = self._turns = self._tokens = 0
        self._last: float | None = None
        self.is_beside = True

    def rate(self, is_beside: bool) -> float:
        """Tokens a second of one way; 0 where unknown."""
        tokens, seconds = self._sums[is_beside]
        return tokens / seconds if seconds else 0.0

    def begin_step(self) -> bool:
        """True if drafts are to be made beside the pass that begins now."""
        now = self._clock()
        if self._last is not None:
            sums = self._sums[self.is_beside]
            sums[0] += self._tokens
            sums[1] += now - self._last
        self._last, self._tokens = now, 0
        self._steps += 1
        if self._steps % TURN == 0:
            self._turns += 1
            self._begin_turn()
        return self.is_beside

    def _begin_turn(self) -> None:
        better = self.rate(True) >= self.rate(False)
        if self._turns < COMPARED:
            self.is_beside = not self.is_beside
        else:
            self.is_beside = better if self._turns % SELDOM else not better
        if self._turns >= COMPARED:
            self._sums[self.is_beside] = [each / 2 for each in self._sums[self.is_beside]]
        self.pause()  # the next step verifies drafts that were made in the other way

    def emitted(self, tokens: int) -> None:
        """Adds tokens of a step."""
        self._tokens += tokens

    def pause(self) -> None:
        """Has the time until the next step not counted: the model is not asked, or no request is running."""
        self._last = None


class DraftThread:
    """The one thread that touches a draft model's sessions, where it drafts beside the target's passes.

    It starts with the first call, and anew in a forked process.

    Args:
        choice: Decides by measured speed whether drafts are made beside passes; None makes them always.

    Attributes:
        choice: As given.
        prepared: Passes beside which drafts were made.
        used: Those whose outcome was among the ones prepared for.
    """

    def __init__(self, choice: WayChoice | None = None) -> None:
        self.choice = choice
        self.prepared = self.used = 0
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def submit(self, call: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Has the thread make a call after those before."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="retrieval-draft-beside")
        return self._pool[1].submit(call, *arguments)

    def run(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """The result of a call on the thread, or what it raised."""
        return self.submit(call, *arguments).result()

    def close(self) -> None:
        """Waits for the last call and ends the thread."""
        pool, self._pool = self._pool, None
        if pool is not None and pool[0] == os.getpid():
            pool[1].shutdown()


class _Preparation:
    """Drafts for some outcomes of a pass, made until it is known which outcome came true.

    Args:
        outcomes: int32 each. Tokens that the target may accept; one more of its own follows.
        budget: As of `propose`.

    Attributes:
        made: Outcomes with the drafts after them.
        done: Set once they are made.
    """

    done: Future[None]

    def __init__(self, outcomes: Sequence[TokenArray], budget: int) -> None:
        self.outcomes, self.budget = [each.tolist() for each in outcomes], budget
        self.made: list[tuple[list[int], Proposal]] = []
        self._emitted: list[int] | None = None
        self._is_over = False

    def emitted(self, tokens: Sequence[int]) -> None:
        """Records what the target has emitted since the preparation began."""
        self._emitted = [*(self._emitted or ()), *tokens]

    def cancel(self) -> None:
        """Has the preparation end where it is."""
        self._is_over = True

    def excludes(self, outcome: list[int]) -> bool:
        """True if drafts for an outcome are of no more use."""
        emitted = self._emitted
        return self._is_over or (emitted is not None and emitted[: len(outcome)] != outcome)

    def make(self, session: PreparesDrafts) -> None:
        """Makes drafts for one outcome after the other."""
        for outcome in self.outcomes:
            if self._emitted is not None and any(not self.excludes(made) for made, _ in self.made):
                return
            if not self.excludes(outcome):
                tokens = np.array(outcome, np.int32)
                proposal = session.propose_after(tokens, self.budget, partial(self.excludes, outcome))
                self.made.append((outcome, proposal))

    def found(self) -> Proposal | None:
        """The drafts after what was emitted; None where there are none."""
        emitted = self._emitted or []
        for outcome, proposal in self.made:
            if not self.excludes(outcome):
                below = _below(proposal, emitted[len(outcome) :])
                if len(below):
                    return below
        return None


class BesideSession:
    """One request of a draft model that drafts while the target's pass runs, as DuoDecoding and PEARL do.

    As a pass begins, the thread makes drafts after the likeliest outcomes of it. Where the target then emits
    one of them and a token that was drafted after it, the drafts below that are there without a wait; else
    the session is asked as usual. Every call of the session inside is made on the thread, so that no two
    threads touch it, or the model, at a time; what it observes and learns waits until it is asked again.

    Args:
        session: The session inside.
        thread: That of its model.

    Example:
        "9 4" is verified and likely; meanwhile the model drafts 5 and 7 after 9 4, and 1 after 9 4 5. The
        target emits 9 4 5: 1 is proposed at once. It emits 9 3: the model is asked for drafts after 9 3.
    """

    prepares = True

    def __init__(self, session: PreparesDrafts, thread: DraftThread) -> None:
        self._session: Any = session
        self._thread = thread
        self._waiting: list[TokenArray | NodeLogits] = []
        self._preparation: _Preparation | None = None
        self._budget = 0
        self._error: Exception | None = None

    def keep_apart(self, key: Hashable) -> None:
        """Passes a key on; see `ModelSession.keep_apart`."""
        if hasattr(self._session, "keep_apart"):
            self._session.keep_apart(key)

    def prepare_for(self, outcomes: Sequence[TokenArray]) -> None:
        """Has drafts made for the outcomes of the pass that begins now, if drafts were asked for this one.

        Args:
            outcomes: int32 each, the likeliest first. Tokens that the pass may accept.
        """
        self._cancel()
        budget, self._budget = self._budget, 0
        choice = self._thread.choice
        if not budget:
            if choice is not None:
                choice.pause()
            if len(self._waiting) > MOST_WAITING:
                self._run(lambda: None)
        elif choice is None or choice.begin_step():
            preparation = _Preparation(outcomes, budget)
            waiting, self._waiting = self._waiting, []
            preparation.done = self._thread.submit(self._prepare, preparation, waiting)
            self._preparation = preparation
            self._thread.prepared += 1

    def propose(self, budget: int) -> Proposal:
        """The drafts that were made for what the target emitted, or new ones."""
        if budget <= 0:
            return empty_proposal("model", "model")
        self._budget = budget
        preparation, self._preparation = self._preparation, None
        if preparation is not None:
            found = preparation.found()  # before drafts for another outcome have come to their end
            if found is None:
                preparation.done.result()
                found = preparation.found()
            if found is not None:
                self._thread.used += 1
                return found
        proposal: Proposal = self._run(self._session.propose, budget)
        return proposal

    def review(self, chain: TokenArray) -> Tensor:
        """Log probabilities after the text and along a chain of guesses; see `ModelSession.review`."""
        logs: Tensor = self._run(self._session.review, chain)
        return logs

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,); a preparation for others ends."""
        self._waiting.append(np.array(tokens, np.int32))
        if self._preparation is not None:
            self._preparation.emitted(tokens.tolist())
        if self._thread.choice is not None:
            self._thread.choice.emitted(len(tokens))

    def learn(self, logits: NodeLogits) -> None:
        """Takes the target's predictions."""
        self._waiting.append(logits)

    def close(self) -> None:
        """Ends a preparation, and the request."""
        self._cancel()
        self._waiting = []
        if self._thread.choice is not None:
            self._thread.choice.pause()
        self._thread.run(self._session.close)

    def _cancel(self) -> None:
        if self._preparation is not None:
            self._preparation.cancel()
            self._preparation = None

    def _run(self, call: Callable[..., Result], *arguments: Any) -> Result:
        waiting, self._waiting = self._waiting, []
        result: Result = self._thread.run(self._called, waiting, call, *arguments)
        return result

    def _called(
        self, waiting: Sequence[TokenArray | NodeLogits], call: Callable[..., Result], *arguments: Any
    ) -> Result:
        """The result of a call after the session inside has taken up what waits; on the thread.

        After an error it raises that again: the session is not used any more.
        """
        if self._error is not None:
            raise self._error
        try:
            for each in waiting:
                if isinstance(each, NodeLogits):
                    self._session.learn(each)
                else:
                    self._session.observe(each)
            return call(*arguments)
        except Exception as error:
            self._error = error
            raise

    def _prepare(self, preparation: _Preparation, waiting: Sequence[TokenArray | NodeLogits]) -> None:
        self._called(waiting, preparation.make, self._session)


def _below(proposal: Proposal, path: Sequence[int]) -> Proposal:
    """The nodes below the end of a path from the root; none where the path leaves the tree."""
    top = -1
    for token in path:
        (nodes,) = np.nonzero((proposal.parents == top) & (proposal.tokens == token))
        if not len(nodes):
            return empty_proposal(proposal.source, proposal.level)
        top = int(nodes[0])
    index = {top: -1}
    for node, parent in enumerate(proposal.parents.tolist()):
        if parent in index and node > top:
            index[node] = len(index) - 1
    kept = list(index)[1:]
    return Proposal(
        proposal.tokens[kept],
        np.array([index[parent] for parent in proposal.parents[kept].tolist()], np.int32),
        proposal.probs[kept],
        proposal.match_lengths[kept],
        proposal.source,
        proposal.level,
    )
