"""From the engine's thread to the request that waits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from retrieval_draft.server.scheduler.channel import Channel, Failed, Tokens


def tokens(*values: int) -> Tokens:
    return Tokens(0, values, (), 0)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 10))


def test_a_reader_gets_all_that_waits_in_order_and_once() -> None:
    async def check() -> None:
        channel = Channel(asyncio.get_running_loop(), 100, lambda: None)
        channel.put([tokens(1), tokens(2)])
        channel.put([tokens(3)])
        assert await channel.get() == [tokens(1), tokens(2), tokens(3)]
        later = asyncio.ensure_future(channel.get())
        await asyncio.sleep(0)
        assert not later.done()
        channel.put([tokens(4)])
        assert await later == [tokens(4)]

    run(check())


def test_a_reader_that_does_not_read_is_given_up_once_and_told() -> None:
    async def check() -> None:
        calls: list[int] = []
        channel = Channel(asyncio.get_running_loop(), 3, lambda: calls.append(1))
        channel.put([tokens(1, 2)])
        channel.put([tokens(3)])
        assert calls == [], "as many as may wait"
        channel.put([tokens(4)])
        channel.put([tokens(5, 6, 7, 8)])
        assert calls == [1]
        (failed,) = await channel.get()
        assert isinstance(failed, Failed)
        assert failed.error.status == 503

    run(check())


def test_what_was_read_makes_room() -> None:
    async def check() -> None:
        calls: list[int] = []
        channel = Channel(asyncio.get_running_loop(), 3, lambda: calls.append(1))
        for _ in range(5):
            channel.put([tokens(1, 2, 3)])
            await channel.get()
        assert calls == []

    run(check())


def test_nothing_is_kept_for_one_that_has_left() -> None:
    async def check() -> None:
        channel = Channel(asyncio.get_running_loop(), 3, lambda: None)
        channel.put([tokens(1)])
        channel.close()
        channel.put([tokens(2)])
        assert await channel.get() == []

    run(check())
