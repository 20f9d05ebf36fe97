"""Texts of the server's scheduler, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.server.scheduler.channel import Channel, Ended, Failed, Tokens
from retrieval_draft.server.scheduler.engine import ServingEngine
from retrieval_draft.server.scheduler.job import Job
from retrieval_draft.server.settings import ServerSettings

__all__ = ["served"]

_SECONDS = 120.0


def served(
    drafter: RetrievalDrafter, prompts: Sequence[Tensor], options: Sequence[dict[str, Any]]
) -> list[list[int]]:
    """Replies to requests that arrive together at a server with one row less than there are of them.

    Prompts are passed in parts between the steps of other rows.

    Args:
        drafter: Owns the model.
        prompts: int64, shape (1, length) each.
        options: Of generation, for each prompt.

    Raises:
        ApiError: The server refused a request, or failed in it.
    """
    return asyncio.run(_served(drafter, prompts, options))


async def _served(
    drafter: RetrievalDrafter, prompts: Sequence[Tensor], options: Sequence[dict[str, Any]]
) -> list[list[int]]:
    loop = asyncio.get_running_loop()
    settings = ServerSettings("model", prefill_chunk=16, max_batch=max(len(prompts) - 1, 1))
    engine = ServingEngine(drafter, settings)
    jobs = []
    for number, (prompt, given) in enumerate(zip(prompts, options, strict=True)):
        channel = Channel(loop, settings.unread_tokens, lambda: None)
        job = Job(str(number), "default", drafter, channel, _SECONDS)
        job.add(drafter.continuous.prepare(prompt, **given))
        jobs.append(job)
    engine.start()
    try:
        for job in jobs:
            engine.submit(job)
        return [await asyncio.wait_for(_reply(job), _SECONDS) for job in jobs]
    finally:
        engine.stop(_SECONDS)


async def _reply(job: Job) -> list[int]:
    tokens: list[int] = []
    while True:
        for event in await job.channel.get():
            if isinstance(event, Tokens):
                tokens += event.tokens
            elif isinstance(event, Failed):
                raise event.error
            elif isinstance(event, Ended):
                return tokens
