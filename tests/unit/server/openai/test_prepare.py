"""A client's request made ready for the engine: limits, options, replies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from msgspec import Raw

from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.engine.sampling.penalties import CountPenalty
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.openai.detokenize import StopTexts
from retrieval_draft.server.openai.generation_request import GenerationFields, Prediction
from retrieval_draft.server.openai.prepare import (
    prepare_request,
    tokenize,
)
from retrieval_draft.server.openai.prompt_logprobs import PromptLogprobs
from retrieval_draft.server.openai.token_masks import AllowedTokens
from retrieval_draft.server.scheduler.job import Job
from tests.support.jobs import empty_job, loaded_for
from tests.support.servers import tiny_drafter, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
DRAFTER = tiny_drafter(tiny_model(TOKENIZER, max_position_embeddings=32), TOKENIZER)
ROWS = len(TOKENIZER)


def prepared(
    *prompts: list[int],
    asks: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **fields: Any,
) -> Job:
    given = GenerationFields(**{"temperature": 0.0, **fields})
    job = empty_job("job")
    loaded = loaded_for(DRAFTER, TOKENIZER, **(settings or {}))
    prepare_request(job, given, loaded, prompts, **{"max_tokens": 4, **(asks or {})})
    job.begin()
    return job


def lengths(asked: Job) -> list[int]:
    """Tokens that each reply may have."""
    requests = [request for each in asked.groups for request in each.prepared.requests]
    return [request.max_length - len(request.prompt) for request in requests]


def refused(*prompts: list[int], **options: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        prepared(*prompts, **options)
    assert error.value.status == 400
    return error.value


@pytest.mark.parametrize(
    ("wanted", "settings", "length"),
    [(4, {}, 4), (None, {"max_tokens": 6}, 6), (9, {"max_tokens": 6}, 6), (None, {}, 30), (99, {}, 30)],
    ids=[
        "as asked",
        "all the server gives",
        "no more than it gives",
        "all the model has",
        "no more than it has",
    ],
)
def test_a_reply_has_room_for_what_all_three_allow(
    wanted: int | None, settings: dict[str, Any], length: int
) -> None:
    asked = prepared([1, 2], asks={"max_tokens": wanted}, settings=settings)
    assert lengths(asked) == [length]
    assert asked.prompt_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "options", "message", "param"),
    [
        ([], {}, "The prompt is empty", "prompt"),
        ([1] * 32, {}, "has 32 tokens; the model's context has 32", "prompt"),
        ([1] * 5, {"settings": {"max_prompt_tokens": 4}}, "has 5 tokens; this server takes 4", "prompt"),
        ([1], {"min_tokens": 5}, "min_tokens is 5; the reply has room for 4", "min_tokens"),
        ([1], {"logit_bias": Raw(f'{{"{ROWS}": 1}}'.encode())}, f"ids end at {ROWS - 1}", "logit_bias"),
        ([1], {"allowed_token_ids": [0, ROWS]}, f"ids end at {ROWS - 1}", "allowed_token_ids"),
        ([ROWS], {}, f"token id {ROWS}", None),
    ],
    ids=["empty", "context", "server's limit", "min tokens", "bias", "allowed", "unknown id"],
)
def test_what_cannot_be_done_names_its_field(
    prompt: list[int], options: dict[str, Any], message: str, param: str | None
) -> None:
    error = refused(prompt, **options)
    assert message in error.message
    assert error.param == param


def test_one_bad_prompt_of_several_is_refused() -> None:
    assert "empty" in refused([1], []).message


def test_greedy_samples_are_decoded_once_and_told_as_often_as_wanted() -> None:
    asked = prepared([1, 2], [3], asks={"samples": 3})
    assert [len(each.choices) for each in asked.groups] == [1, 1]
    assert [list(reply.indices) for reply in asked.replies] == [[0, 1, 2], [3, 4, 5]]


def test_drawn_samples_are_decoded_each_with_one_seed() -> None:
    asked = prepared([1, 2], [3], asks={"samples": 2}, temperature=1.0, seed=7)
    assert [len(each.choices) for each in asked.groups] == [2, 2]
    assert [list(reply.indices) for reply in asked.replies] == [[0], [1], [2], [3]]
    again = prepared([1, 2], asks={"samples": 2}, temperature=1.0, seed=7)
    for each in (asked, again):
        keys = [request.noise.sample_key for request in each.groups[0].prepared.requests if request.noise]
        assert keys == [GumbelNoise(7, ROWS, torch.device("cpu"), sample).sample_key for sample in (0, 1)]


def test_competing_samples_keep_their_probabilities() -> None:
    asked = prepared([1, 2], asks={"samples": 3, "competing": True}, temperature=1.0)
    requests = asked.groups[0].prepared.requests
    assert len(requests) == 3
    assert all(request.sampler is not None and request.sampler.logprobs is not None for request in requests)


def test_stop_strings_are_looked_for_by_the_engine() -> None:
    asked = prepared([1, 2], stop=Raw(b'["ab"]'))
    (request,) = asked.groups[0].prepared.requests
    (criterion,) = request.criteria
    assert isinstance(criterion, StopTexts)
    assert criterion.text is asked.choices[0].text
    plain = prepared([1, 2])
    assert plain.choices[0].text is None
    assert len(plain.groups[0].prepared.requests[0].criteria) == 0


def test_the_end_token_can_be_ignored() -> None:
    eos = TOKENIZER.eos_token_id
    model: Any = DRAFTER.continuous.target.model
    model.generation_config.eos_token_id = eos
    try:
        assert prepared([1]).groups[0].prepared.requests[0].eos == {eos}
        assert prepared([1], ignore_eos=True).groups[0].prepared.requests[0].eos == frozenset()
    finally:
        model.generation_config.eos_token_id = None


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({}, []),
        ({"presence_penalty": 0.5}, [CountPenalty]),
        ({"frequency_penalty": 0.5}, [CountPenalty]),
        ({"allowed_token_ids": [1, 2]}, [AllowedTokens]),
        ({"presence_penalty": 0.0, "frequency_penalty": 0.0}, []),
    ],
)
def test_only_what_is_asked_for_changes_logits(fields: dict[str, Any], kinds: list[type]) -> None:
    sampler = prepared([1], **fields).groups[0].prepared.requests[0].sampler
    found = [] if sampler is None else [type(each) for each in sampler._head]
    assert found == kinds


def test_where_no_reply_is_wanted_the_prompt_is_scored_and_nothing_said() -> None:
    asked = prepared([1, 2, 3], asks={"max_tokens": 0, "top_logprobs": 1, "echoed": ["abc"]})
    (reply,), (request,) = asked.replies, asked.groups[0].prepared.requests
    assert lengths(asked) == [1]
    assert reply.prompt_text == "abc"
    assert isinstance(request.read_prompt, PromptLogprobs)
    assert request.read_prompt is reply.prompt_logprobs
    assert reply.prompt == [1, 2, 3]
    assert max(reply.prompt_offsets) <= 3


def test_an_echo_without_log_probabilities_reads_no_logits() -> None:
    asked = prepared([1, 2], asks={"echoed": ["ab"]})
    assert asked.replies[0].prompt_text == "ab"
    assert asked.groups[0].prepared.requests[0].read_prompt is None


def test_documents_and_prediction_are_references_and_not_part_of_the_prompt() -> None:
    asked = prepared([1], documents=Raw(b'["ab", ""]'), prediction=Prediction("gh"))
    ids = [TOKENIZER(text)["input_ids"] for text in ("ab", "gh")]
    assert sorted(each.tolist() for each in asked.groups[0].prepared.references) == sorted(ids)
    assert asked.predicted == ids[1]
    assert asked.prompt_tokens == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": Raw(b'["ab", "ab", "ab", "ab"]')}, "documents"),
        ({"documents": Raw(b'["ab", "ab"]'), "prediction": Prediction("abab")}, "prediction"),
        ({"documents": Raw(b'["ab", "ab"]'), "prediction": Prediction("ab")}, None),
    ],
)
def test_references_have_a_limit_together(fields: dict[str, Any], param: str | None) -> None:
    settings = {"max_reference_tokens": 3}
    if param is None:
        assert len(prepared([1], settings=settings, **fields).groups[0].prepared.references) == 3
    else:
        assert refused([1], settings=settings, **fields).param == param


def test_a_text_too_long_for_any_prompt_is_not_tokenised() -> None:
    asked = loaded_for(DRAFTER, TOKENIZER, max_prompt_tokens=4)
    assert tokenize(asked, "a" * 12, "prompt")
    with pytest.raises(ApiError, match="13 characters; 4 tokens") as error:
        tokenize(asked, "a" * 13, "prompt")
    assert error.value.param == "prompt"


def test_nothing_is_prepared_for_one_that_has_left() -> None:
    def gone() -> None:
        raise ApiError(499, "gone")

    left = replace(loaded_for(DRAFTER, TOKENIZER), check=gone)
    with pytest.raises(ApiError, match="gone"):
        prepare_request(empty_job("job"), GenerationFields(), left, [[1]], 4)
    with pytest.raises(ApiError, match="gone"):
        tokenize(left, "a", "prompt")


@pytest.mark.parametrize("prompt", [[0], [0, 5, 6], [5, 0, 6], [5, 6, 0]])
def test_pad_tokens_of_a_prompt_are_text(prompt: list[int]) -> None:
    """As in prompts of token ids, and for models whose pad token is a token like any other."""
    config = DRAFTER.target.model.generation_config
    before = config.pad_token_id, config.eos_token_id
    config.pad_token_id, config.eos_token_id = 0, 1
    try:
        asked = prepared(prompt)
    finally:
        config.pad_token_id, config.eos_token_id = before
    assert [request.prompt.tolist() for each in asked.groups for request in each.prepared.requests] == [
        prompt
    ]
    assert asked.prompt_tokens == len(prompt)
