"""One HTTP request as the engine sees it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.generation.requests import DecodeRequests
from retrieval_draft.server.scheduler.job import Job
from tests.support.jobs import empty_job


def test_choices_are_numbered_through_all_prompts() -> None:
    job = empty_job("a", 2, 1, 3)
    assert [choice.index for choice in job.choices] == [0, 1, 2, 3, 4, 5]
    assert [[choice.index for choice in group.choices] for group in job.groups] == [[0, 1], [2], [3, 4, 5]]
    assert job.size == 6


def test_a_choice_knows_its_job_and_its_own_request() -> None:
    job = empty_job("a", 1, 2)
    assert all(choice.job is job for choice in job.choices)
    requests = [request for group in job.groups for request in group.prepared.requests]
    assert [choice.request for choice in job.choices] == requests
    assert len({id(choice.stats) for choice in job.choices}) == 3


def test_a_job_without_prompts_has_no_choices() -> None:
    assert (empty_job("a").size, empty_job("a").choices) == (0, [])


@pytest.mark.parametrize("begun", [False, True])
def test_a_job_that_no_one_decodes_leaves_nothing_for_a_collection(begun: bool) -> None:
    """A client may leave while its request is prepared, or be refused by the engine."""
    nothing: Any = None
    job = Job("a", "default", nothing, nothing, 60.0)
    prompt = np.array([1], np.int32)
    left = weakref.ref(prompt)
    job.add(DecodeRequests([DecodeRequest(prompt, 2)]))
    del prompt
    if begun:
        job.begin()
        job.release()
    gc.disable()
    try:
        del job
        assert left() is None
    finally:
        gc.enable()
