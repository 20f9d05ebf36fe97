"""Penalties, tokens as text, predictions, limits and the queue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.sampling.token_logprobs import token_logprobs
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.generation.requests import DecodeRequests
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.detokenize import ReplyText
from retrieval_draft.server.openai.penalties import CountPenalty
from retrieval_draft.server.openai.reply import Reply, predicted_tokens
from retrieval_draft.server.openai.token_text import TokenTexts
from retrieval_draft.server.scheduler.channel import Tokens
from retrieval_draft.server.scheduler.job import Job
from retrieval_draft.server.scheduler.queue import JobQueue
from retrieval_draft.server.settings import ServerSettings
from tests.support.tiny import byte_tokenizer


def test_penalties_count_the_reply_only() -> None:
    penalty = CountPenalty(2, presence=1.0, frequency=0.5)
    ids = torch.tensor([[3, 3, 1, 1, 2]])
    assert penalty(ids, torch.zeros(1, 4)).tolist() == [[0.0, -2.0, -1.5, 0.0]]
    assert penalty(ids[:, :2], torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_logprobs_of_a_token() -> None:
    said = token_logprobs(torch.tensor([0.5, 0.25, 0.25]).log(), 1, 1)
    assert said.logprob == pytest.approx(-1.3863, abs=1e-4)
    assert said.top == [0]
    assert said.top_logprobs == pytest.approx([-0.6931], abs=1e-4)


def test_tokens_that_are_no_text_show_their_bytes() -> None:
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    letter, euro = tokenizer("a€", add_special_tokens=False)["input_ids"][:2]
    assert (texts.text(letter), texts.bytes(letter)) == ("a", [97])
    assert (texts.text(euro), texts.bytes(euro)) == ("bytes:\\xe2", [0xE2])


def test_predicted_tokens_are_drafted_ones_that_go_on_as_predicted() -> None:
    reply = Reply([0], ReplyText(lambda ids: ""), [1, 5])
    reply.take(Tokens(0, [6], (), 0))
    reply.take(Tokens(0, [7, 9], (), 1))
    reply.take(Tokens(0, [8, 3, 4], (), 2))
    # 7 behind 6 is predicted and was drafted; 6 was not drafted; 8 behind 9 and 3 behind 8 are not predicted.
    assert predicted_tokens([reply], [5, 6, 7, 8]) == (1, 3)
    assert predicted_tokens([reply], []) == (0, 0)


def make_job(name: str, *sizes: int) -> Job:
    drafter: Any = None
    job = Job(name, "default", drafter, drafter, 60.0)
    for size in sizes:
        job.add(DecodeRequests([DecodeRequest(np.array([1], np.int32), 2) for _ in range(size)]))
    return job


def test_the_queue_is_first_come_first_served_and_bounded() -> None:
    queue = JobQueue(5)
    first, second = make_job("a", 2, 1), make_job("b", 2)
    queue.put(first)
    queue.put(second)
    with pytest.raises(ApiError) as full:
        queue.put(make_job("c", 1))
    assert full.value.status == 429
    assert full.value.headers() == {"Retry-After": "1"}
    assert queue.next(1) is None  # the first does not fit, and nobody overtakes it
    assert queue.next(2) is first.groups[0]
    assert queue.waiting == 3
    queue.drop(first)
    assert queue.jobs() == [second]
    queue.refuse(ApiError(503, "stop"))
    with pytest.raises(ApiError) as stopped:
        queue.put(make_job("d", 1))
    assert stopped.value.status == 503
    queue.end()
    assert queue.wait()
    assert queue.next(8) is second.groups[0]
    assert not queue.wait()


def test_errors_can_be_sent_whatever_they_quote() -> None:
    assert ApiError(400, "half \ud800").body()["error"]["message"] == "half ?"
    assert ApiError(418, "teapot").body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "options", [{"max_batch": 0}, {"max_choices": 300}, {"grace_seconds": -1.0}, {"max_prompt_tokens": -5}]
)
def test_limits_are_checked(options: Any) -> None:
    with pytest.raises(InvalidInputError):
        ServerSettings("m", **options)
