"""Events from the engine's thread to the request on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from retrieval_draft.drafting.stats import DraftStats
from retrieval_draft.engine.sampling.token_logprobs import TokenLogprobs
from retrieval_draft.server.errors import ApiError

__all__ = ["Channel", "Ended", "Event", "Failed", "Tokens"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of one choice.

    Attributes:
        index: Index of the choice.
        tokens: In order.
        logprobs: One for each token, where they are wanted.
        accepted: Number of them that were drafted.
        pieces: Text that each made final, where it was decoded for stop strings; else None.
        offsets: Offset of each in the text, with `pieces`.
    """

    index: int
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    accepted: int
    pieces: Sequence[str] | None = None
    offsets: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a choice.

    Attributes:
        index: Index of the choice.
        reason: "stop" or "length".
        stats: Its counts.
        logprob: Natural logarithm of its probability, where samples compete.
        accepted_steps: Number of steps with drafts by the number of accepted ones.
        rest: The end of the text, where it was decoded for stop strings; else None.
    """

    index: int
    reason: str
    stats: DraftStats
    logprob: float
    accepted_steps: Mapping[int, int]
    rest: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The failure or abort of the whole request."""

    error: ApiError


Event = Tokens | Ended | Failed


class Channel:
    """Queue of events for one request. Everything but `loop` is used on the event loop's thread only.

    Args:
        loop: Event loop of the request.
        limit: Limit of waiting tokens.
        overflowed: Called once when more tokens wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int, overflowed: Callable[[], object]) -> None:
        self.loop = loop
        self._limit = limit
        self._overflowed: Callable[[], object] | None = overflowed
        self._events: list[Event] = []
        self._waiting = 0
        self._ready = asyncio.Event()
        self._closed = False

    def put(self, events: Sequence[Event]) -> None:
        """Adds events; drops them once closed."""
        if self._closed:
            return
        self._events += events
        self._waiting += sum(len(event.tokens) for event in events if isinstance(event, Tokens))
        if self._waiting > self._limit:
            overflowed = self._overflowed
            self.close()
            self._events = [Failed(ApiError(503, "The stream was not read for too long, and is given up."))]
            if overflowed is not None:
                overflowed()
        self._ready.set()

    async def get(self) -> list[Event]:
        """Returns all waiting events; waits while there is none."""
        await self._ready.wait()
        self._ready.clear()
        events, self._events, self._waiting = self._events, [], 0
        return events

    def close(self) -> None:
        """Closes the queue: events are no longer read."""
        self._closed = True
        self._overflowed = None  # it may know the request, and that this channel
        self._events, self._waiting = [], 0
