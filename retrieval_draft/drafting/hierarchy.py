"""The hierarchy of draft sources, nearest first; a source that fails costs drafts, never the generation."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from retrieval_draft.index.source import (
    DraftSource,
    NodeLogits,
    Proposal,
    SourceSession,
    TokenArray,
    empty_proposal,
)
from retrieval_draft.index.store.store import SharedStore

__all__ = ["OuterSession", "SourceHierarchy", "SourceSessions", "open_parallel", "wants_hidden"]

CERTAIN = 0.5
"""Later sources are skipped after one that gives all of its nodes together this probability."""

_log = logging.getLogger("retrieval_draft")


class _GuardedSource:
    """A draft source and its count of exceptions."""

    def __init__(self, source: DraftSource) -> None:
        self.source = source
        self.failures = 0

    def failed(self, call: str, error: Exception) -> None:
        """Counts a failure, and warns of the first."""
        self.failures += 1
        if self.failures == 1:
            _log.warning(
                "Draft source %r raised in %s and is left out for this request: %r",
                self.source.name, call, error, exc_info=error,
            )  # fmt: skip


class _Opened:
    """A source in one request. `session` is None once a call of it has raised."""

    __slots__ = ("guarded", "session")

    def __init__(self, guarded: _GuardedSource, session: SourceSession | None) -> None:
        self.guarded = guarded
        self.session = session

    def failed(self, call: str, error: Exception) -> None:
        self.session = None
        self.guarded.failed(call, error)


class SourceSessions:
    """Sessions of one request in all sources, called together.

    Attributes:
        learns_early: Whether a source drafts from the last predictions, and so learns before each proposal.
        prepares: Whether a source drafts beside the target's pass.
    """

    def __init__(self, opened: Sequence[_Opened] = ()) -> None:
        self._opened = tuple(opened)
        self._heads = tuple(each for each in self._opened if wants_hidden(each.session))
        self.learns_early = any(_learns_early(each.session) for each in self._opened)
        self.prepares = any(_prepares(each.session) for each in self._opened)

    def propose(self, budget: int) -> list[Proposal]:
        """One proposal of at most `budget` nodes from each source, in their order; empty ones too.

        Fusion and calibration identify a source by its index, so the order is the same at every step. Where
        the joint probability of a near source's full budget reaches `CERTAIN`, later sources are skipped.
        Paced ones propose nothing here: see `ask`.
        """
        if budget <= 0:
            return []
        proposals: list[Proposal] = []
        is_full = False
        for opened in self._opened:
            proposal = None
            if opened.session is not None and not _is_paced(opened.session):
                try:
                    proposal = opened.session.propose(0 if is_full else budget)
                    is_full = is_full or _fills(proposal, budget)
                except Exception as error:  # a store that fails must not fail the generation
                    opened.failed("propose", error)
            if proposal is None:
                source = opened.guarded.source
                proposal = empty_proposal(source.name, source.level)
            proposals.append(proposal)
        return proposals

    @property
    def paced(self) -> tuple[tuple[int, Any], ...]:
        """Index and session of each source that is asked only where that pays."""
        return tuple(
            (index, opened.session)
            for index, opened in enumerate(self._opened)
            if opened.session is not None and _is_paced(opened.session)
        )

    def ask(self, index: int, budget: int) -> Proposal:
        """The proposal of one paced source, of at most `budget` nodes."""
        opened = self._opened[index]
        source = opened.guarded.source
        try:
            if opened.session is not None:
                return opened.session.propose(budget)
        except Exception as error:  # as above
            opened.failed("propose", error)
        return empty_proposal(source.name, source.level)

    def observe(self, tokens: TokenArray) -> None:
        """Appends accepted tokens, int32, shape (m,), to the text of every source."""
        for opened in self._opened:
            if opened.session is not None:
                try:
                    opened.session.observe(tokens)
                except Exception as error:  # as above
                    opened.failed("observe", error)

    def learn(self, logits: NodeLogits, early: bool | None = None) -> None:
        """Passes the target's predictions at verified nodes to the sources.

        Args:
            logits: The predictions.
            early: True for those sources alone that draft from the last predictions, False for the others
                alone, None for all.
        """
        for opened in self._opened:
            if opened.session is not None and early in (None, _learns_early(opened.session)):
                try:
                    opened.session.learn(logits)
                except Exception as error:  # as above
                    opened.failed("learn", error)

    @property
    def wants_hidden(self) -> bool:
        """True if a session drafts from the target's hidden states."""
        return any(opened.session is not None for opened in self._heads)

    def share_hidden(self, key: Hashable) -> None:
        """Sets the states that sessions keep and find apart from those of requests with other keys."""
        for opened in self._opened:
            share: Any = getattr(opened.session, "share_hidden", None)  # one that keeps states has it
            if share is not None:
                try:
                    share(key)
                except Exception as error:  # as above
                    opened.failed("share_hidden", error)

    def keep_apart(self, key: Hashable) -> None:
        """Has sessions learn apart from those of requests with other keys; before they draft."""
        for opened in self._opened:
            keep: Any = getattr(opened.session, "keep_apart", None)  # one that learns for all requests has it
            if keep is not None:
                try:
                    keep(key)
                except Exception as error:  # a source's own code raises anything
                    opened.failed("keep_apart", error)

    def learn_hidden(self, hidden: Any, begin: int) -> None:
        """Passes the target's states to the sessions that draft from them.

        Args:
            hidden: (n, d), at tokens of the request's text.
            begin: Index of the first of them in the text.
        """
        for opened in self._heads:
            if opened.session is not None:
                head: Any = opened.session
                try:
                    head.learn_hidden(hidden, begin)
                except Exception as error:  # as above
                    opened.failed("learn_hidden", error)

    def wants_cache(self, captured: bool) -> bool:
        """True if a session drafts from the target's cache; `captured` as of `lend_cache`."""
        return any(_takes_cache(opened.session, captured) for opened in self._opened)

    def lend_cache(self, cache: Any, captured: bool) -> None:
        """Lends the sessions that draft from it the target's cache of the text but for its last token.

        Args:
            cache: The cache; None where it is not of the text that the sources have seen.
            captured: Whether captured passes use it: then it is lent to sessions that read it alone.
        """
        for opened in self._opened:
            if _takes_cache(opened.session, captured):
                drafter: Any = opened.session
                try:
                    drafter.lend_cache(cache)
                except Exception as error:  # as above
                    opened.failed("lend_cache", error)

    def prepare_for(self, outcomes: Sequence[TokenArray]) -> None:
        """Has the sessions that draft beside the target's pass prepare for its outcomes; as it begins.

        Args:
            outcomes: int32 each, the likeliest first. Tokens that the pass may accept.
        """
        for opened in self._opened:
            if _prepares(opened.session):
                drafter: Any = opened.session
                try:
                    drafter.prepare_for(outcomes)
                except Exception as error:  # as above
                    opened.failed("prepare_for", error)

    def fork_hidden(self, other: SourceSessions) -> None:
        """Gives sessions the target's states that another request with the same prompt has."""
        for opened, owner in zip(self._opened, other._opened, strict=False):
            if wants_hidden(opened.session) and owner.session is not None:
                head: Any = opened.session
                try:
                    head.fork(owner.session)
                except Exception as error:  # as above
                    opened.failed("fork", error)

    def close(self) -> None:
        """Ends the request in every source."""
        for opened in self._opened:
            if opened.session is not None:
                try:
                    opened.session.close()
                except Exception as error:  # as above
                    opened.failed("close", error)


class SourceHierarchy:
    """Draft sources in order of locality, opened together for a request.

    An exception in a source counts as a failure and leaves the source out for the rest of the request.

    Args:
        sources: Nearest first.
    """

    def __init__(self, sources: Sequence[DraftSource]) -> None:
        self._guarded = [_GuardedSource(source) for source in sources]

    @property
    def sources(self) -> tuple[DraftSource, ...]:
        """The sources, nearest first."""
        return tuple(guarded.source for guarded in self._guarded)

    @property
    def store(self) -> SharedStore | None:
        """The store of the first source that has one."""
        stores = (getattr(source, "store", None) for source in self.sources)
        return next((store for store in stores if isinstance(store, SharedStore)), None)

    def open(self, prompt: TokenArray, references: Sequence[TokenArray] = ()) -> SourceSessions:
        """Starts a request in every source.

        Args:
            prompt: int32, shape (length,).
            references: int32, shape (length,) each. Texts that the reply may quote.
        """
        return self.open_parallel(prompt, references, 1)[0]

    def open_parallel(
        self, prompt: TokenArray, references: Sequence[TokenArray], count: int
    ) -> list[SourceSessions]:
        """Starts `count` requests with one prompt, which draft from each other's replies where a source can.

        Args:
            prompt: int32, shape (length,).
            references: int32, shape (length,) each. Texts that the replies may quote.
            count: Requests to start.
        """
        opened: list[list[_Opened]] = [[] for _ in range(count)]
        for guarded in self._guarded:
            sessions: list[SourceSession | None] = [None] * count
            try:
                sessions = [*open_parallel(guarded.source, prompt, references, count)]
            except Exception as error:  # as above
                guarded.failed("open", error)
            for request, session in zip(opened, sessions, strict=True):
                request.append(_Opened(guarded, session))
        return [SourceSessions(request) for request in opened]

    def keep(self, texts: Sequence[TokenArray]) -> None:
        """Adds texts, int32 each, to the sources that keep those of requests, and that can add some apart."""
        for guarded in self._guarded:
            keep: Any = getattr(guarded.source, "keep", None)
            for text in texts if keep is not None else ():
                try:
                    keep(text, np.empty(0, np.int32))
                except Exception as error:  # as above
                    guarded.failed("keep", error)

    def prepare(self) -> None:
        """Runs the sources' preparations before the first request, such as measuring kernels."""
        for guarded in self._guarded:
            prepare = getattr(guarded.source, "prepare", None)
            if prepare is not None:
                try:
                    prepare()
                except Exception as error:  # as above
                    guarded.failed("prepare", error)

    def flush(self) -> None:
        """Waits until the texts of finished requests can be looked up in every source."""
        for source in self.sources:
            source.flush()

    def close(self) -> None:
        """Closes every source: queued texts are written, background threads stop."""
        for source in self.sources:
            source.close()

    @property
    def failures(self) -> int:
        """Calls in which a source raised so far."""
        return sum(guarded.failures for guarded in self._guarded)

    @property
    def nbytes(self) -> int:
        """Bytes held by all sources, sessions excluded."""
        return sum(source.nbytes for source in self.sources)


def open_parallel(
    source: DraftSource, prompt: TokenArray, references: Sequence[TokenArray], count: int
) -> list[SourceSession]:
    """A source's sessions of `count` requests with one prompt; uses its `open_parallel` if it has one.

    Args:
        source: The source.
        prompt: int32, shape (length,).
        references: int32, shape (length,) each. Texts that the replies may quote.
        count: Number of requests.
    """
    together: Any = getattr(source, "open_parallel", None)
    if together is not None and count > 1:
        return list(together(prompt, references, count))
    return [source.open(prompt, references) for _ in range(count)]


def wants_hidden(session: object) -> bool:
    """True if a session has `learn_hidden` and a use for it."""
    return bool(getattr(session, "wants_hidden", False))


class OuterSession:
    """Base of sessions around others, which get the target's hidden states and cache through them.

    Attributes:
        inner: The sessions inside.
    """

    inner: Sequence[Any] = ()

    @property
    def wants_hidden(self) -> bool:
        """True if one of them has a use for the states."""
        return any(wants_hidden(each) for each in self.inner)

    def share_hidden(self, key: Hashable) -> None:
        """Passes the key on; see `SourceSessions.share_hidden`."""
        for each in self.inner:
            if hasattr(each, "share_hidden"):
                each.share_hidden(key)

    def keep_apart(self, key: Hashable) -> None:
        """Passes the key on; see `SourceSessions.keep_apart`."""
        for each in self.inner:
            if hasattr(each, "keep_apart"):
                each.keep_apart(key)

    def learn_hidden(self, hidden: Any, begin: int) -> None:
        """Passes states on; see `SourceSessions.learn_hidden`."""
        for each in self.inner:
            if wants_hidden(each):
                each.learn_hidden(hidden, begin)

    @property
    def wants_cache(self) -> bool:
        """True if one of them drafts from the target's cache."""
        return any(getattr(each, "wants_cache", False) for each in self.inner)

    @property
    def writes_cache(self) -> bool:
        """True if one of them passes nodes of its own over it."""
        return any(getattr(each, "writes_cache", False) for each in self.inner)

    def lend_cache(self, cache: Any) -> None:
        """Lends the cache on; see `SourceSessions.lend_cache`."""
        for each in self.inner:
            if getattr(each, "wants_cache", False):
                each.lend_cache(cache)

    @property
    def prepares(self) -> bool:
        """True if one of them drafts beside the target's pass."""
        return any(_prepares(each) for each in self.inner)

    def prepare_for(self, outcomes: Sequence[TokenArray]) -> None:
        """Passes the outcomes on; see `SourceSessions.prepare_for`."""
        for each in self.inner:
            if _prepares(each):
                each.prepare_for(outcomes)

    def fork(self, owner: OuterSession) -> None:
        """Gives them the states that those of another request with the same prompt have."""
        for each, other in zip(self.inner, owner.inner, strict=True):
            if wants_hidden(each):
                each.fork(other)


def _takes_cache(session: object, captured: bool) -> bool:
    """True if a session has a use for the target's cache, and leaves the memory of captured passes alone."""
    writes = bool(getattr(session, "writes_cache", False))
    return bool(getattr(session, "wants_cache", False)) and not (captured and writes)


def _prepares(session: object) -> bool:
    return bool(getattr(session, "prepares", False))


def _learns_early(session: object) -> bool:
    return bool(getattr(session, "learns_early", False))


def _is_paced(session: object) -> bool:
    return bool(getattr(session, "is_paced", False))


def _fills(proposal: Proposal, budget: int) -> bool:
    """True if a proposal has `budget` nodes and gives all of them together `CERTAIN` or more."""
    # The last is among the least probable ones, and most often decides it alone.
    probs = proposal.probs
    return len(proposal) == budget and bool(probs[-1] >= CERTAIN and probs.prod() >= CERTAIN)
