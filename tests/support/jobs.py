"""Jobs of a serving engine, without HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import torch

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.generation.requests import DecodeRequests
from retrieval_draft.server.openai.detokenize import ReplyText, StopTexts, decoder
from retrieval_draft.server.scheduler.channel import Channel, Ended, Event, Failed
from retrieval_draft.server.scheduler.job import Job
from retrieval_draft.server.service import Loaded
from retrieval_draft.server.settings import ServerSettings


def loaded_for(drafter: RetrievalDrafter, tokenizer: Any, longest: int = 3, **settings: Any) -> Loaded:
    """The objects that requests of text are prepared with, without an engine."""
    nothing: Any = None
    return Loaded(
        drafter, ServerSettings("m", **settings), tokenizer, decoder(tokenizer), nothing, longest, {},
        nothing, nothing, nothing,
    )  # fmt: skip


def empty_job(name: str, *sizes: int, tenant: str = "default", priority: int = 0) -> Job:
    """A job with prompts of so many samples each, which nobody will decode."""
    nothing: Any = None
    job = Job(name, tenant, nothing, nothing, 60.0, priority=priority)
    for size in sizes:
        job.add(DecodeRequests([DecodeRequest(np.array([1], np.int32), 2) for _ in range(size)]))
    job.begin()
    return job


def job_of(
    drafter: RetrievalDrafter,
    prompt: torch.Tensor,
    name: str = "job",
    *,
    seconds: float = 60.0,
    tenant: str = "default",
    unread: int = 1 << 16,
    text: ReplyText | None = None,
    **options: Any,
) -> Job:
    """A job that continues a prompt, int64, shape (1, length), greedily and to no stop string by default."""
    channel = Channel(asyncio.get_running_loop(), unread, lambda: None)
    job = Job(name, tenant, drafter, channel, seconds)
    made = drafter.continuous.prepare(prompt, **{"do_sample": False, "max_new_tokens": 8, **options})
    if text is not None:
        made.requests[0].criteria.append(StopTexts(text))
    job.add(made, None if text is None else [text])
    return job


async def ended(job: Job) -> list[Event]:
    """All that a job's client is told, to the last end or to its failure."""
    events: list[Event] = []
    left = job.size
    while left:
        for each in await asyncio.wait_for(job.channel.get(), 60):
            events.append(each)
            left -= isinstance(each, Ended)
            if isinstance(each, Failed):
                return events
    return events
