"""A stream of events to a client that leaves at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from retrieval_draft.http.event_stream import EventStream


@pytest.mark.parametrize("sooner", range(4))
@pytest.mark.parametrize("turns", range(6))
def test_a_client_that_leaves_while_an_event_is_sent_ends_the_stream(turns: int, sooner: int) -> None:
    """Before Python 3.12 a cancellation is lost where the event is sent in the same turn of the loop."""

    async def serve() -> int:
        left, calls = asyncio.Event(), 0

        async def events() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            await asyncio.Event().wait()  # as of a queue to which nothing is put any more

        async def receive() -> dict[str, Any]:
            await left.wait()
            for _ in range(sooner):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):
                left.set()
                for _ in range(turns):
                    await asyncio.sleep(0)

        def gone() -> None:
            nonlocal calls
            calls += 1

        serving = asyncio.ensure_future(EventStream(events(), gone, 60.0)({"type": "http"}, receive, send))
        ended, _ = await asyncio.wait({serving}, timeout=5)
        return calls if ended else -1

    assert asyncio.run(serve()) == 1
