"""From prompts and options to the requests of the decoding loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
)

from retrieval_draft.engine.cache.cache_rows import CacheRows
from retrieval_draft.engine.request import DecodeRequest
from retrieval_draft.engine.sampling.noise import GumbelNoise
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.generation.requests import DecodeOptions, make_requests, set_limits, share_when_finished
from retrieval_draft.generation.streaming import StreamRows
from retrieval_draft.index.source import TokenArray
from tests.support.models import make

TARGET = Target(make("llama"))
HERE = torch.device("cpu")


def requests(
    prompts: list[list[int]],
    *,
    cache: Any = None,
    processors: Any = (),
    stream: StreamRows | None = None,
    extras: dict[str, Any] | None = None,
    **options: Any,
) -> list[DecodeRequest]:
    """Requests of left-padded prompts."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    config = GenerationConfig(**{"max_length": width + 5, **options})
    criteria = StoppingCriteriaList([MaxLengthCriteria(width + 5)])
    arrays = [np.array(prompt, np.int32) for prompt in prompts]
    given = LogitsProcessorList(processors), criteria, config, cache, DecodeOptions(**(extras or {}))
    return make_requests(TARGET, arrays, ids, *given, stream)


def keys(found: list[DecodeRequest]) -> list[int]:
    """Keys that tell the noise of each request from others."""
    assert all(request.noise is not None for request in found)
    return [int(request.noise.sample_key) for request in found if request.noise is not None]


def key(seed: int, sample: int) -> int:
    return int(GumbelNoise(seed, 97, HERE, sample).sample_key)


def test_each_row_has_its_prompt_its_padded_text_and_the_same_room() -> None:
    first, second = requests([[5, 6, 7], [8]])
    assert (first.prompt.tolist(), second.prompt.tolist()) == ([5, 6, 7], [8])
    assert second.padded is not None
    assert second.padded.tolist() == [[0, 0, 8]]
    assert (first.max_length, second.max_length) == (8, 6)


def test_equal_prompts_share_the_pass_of_the_first() -> None:
    found = requests([[5, 6], [7, 8], [5, 6], [7, 8], [5, 6]])
    owners = [None if each.prefix_owner is None else found.index(each.prefix_owner) for each in found]
    assert owners == [None, None, 0, 1, 0]


def test_greedy_rows_draw_nothing_and_choose_without_a_sampler() -> None:
    (request,) = requests([[5]])
    assert (request.noise, request.sampler) == (None, None)


@pytest.mark.parametrize(
    ("options", "extras"),
    [
        ({"do_sample": True}, {}),
        ({"processors": [TopKLogitsWarper(3)]}, {}),
        ({"return_dict_in_generate": True, "output_scores": True}, {}),
        ({"return_dict_in_generate": True, "output_logits": True}, {}),
        ({}, {"top_logprobs": 0}),
    ],
)
def test_what_looks_at_scores_needs_a_sampler(options: dict[str, Any], extras: dict[str, Any]) -> None:
    (request,) = requests([[5]], extras=extras, **options)
    assert request.sampler is not None
    assert (request.noise is not None) == bool(options.get("do_sample"))


def test_scores_that_nobody_returns_are_not_kept() -> None:
    (request,) = requests([[5]], output_scores=True, output_logits=True, do_sample=True)
    assert request.sampler is not None
    assert (request.sampler.scores, request.sampler.logits) == (None, None)


def test_a_row_draws_what_its_prompt_would_draw_alone() -> None:
    found = keys(requests([[5], [6], [5], [6], [5]], do_sample=True, extras={"seeds": 3}))
    assert found == [key(3, 0), key(3, 0), key(3, 1), key(3, 1), key(3, 2)]
    later = keys(requests([[5], [5]], do_sample=True, extras={"seeds": 3, "sample": 1}))
    assert later == [key(3, 1), key(3, 2)]


def test_each_prompt_may_have_a_seed_which_its_samples_share() -> None:
    options = {"do_sample": True, "num_return_sequences": 2, "extras": {"seeds": [3, np.int64(4)]}}
    assert keys(requests([[5], [5], [6], [6]], **options)) == [key(3, 0), key(3, 1), key(4, 0), key(4, 1)]


def test_without_a_seed_torch_s_generator_decides() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(keys(requests([[5], [6]], do_sample=True)))
    assert drawn[0] == drawn[1] != keys(requests([[5], [6]], do_sample=True))
    assert len(set(drawn[0])) == 2


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([1], "1 values for 2 prompts"),
        ([1, 2, 3], "3 values"),
        (1.5, "1.5, a float"),
        (["x", 1], "'x', a str"),
    ],
)
def test_seeds_are_integers_one_or_as_many_as_prompts(seeds: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        requests([[5], [6]], do_sample=True, extras={"seeds": seeds})


def test_a_cache_begins_the_first_row_of_each_prompt_and_leads_its_samples() -> None:
    given = CacheRows([TARGET.cache(8), TARGET.cache(8)])
    found = requests([[5], [5], [6], [6]], do_sample=True, num_return_sequences=2, cache=given)
    assert [request.cache for request in found] == [given.rows[0], None, given.rows[1], None]
    assert [request.prefix_owner for request in found] == [None, found[0], None, found[2]]


def test_rows_of_one_prompt_with_caches_of_their_own_do_not_share_a_pass() -> None:
    given = CacheRows([TARGET.cache(8), TARGET.cache(8)])
    assert [request.prefix_owner for request in requests([[5], [5]], cache=given)] == [None, None]


def test_tokens_go_to_the_row_of_the_streamer_they_belong_to() -> None:
    class Streamer:
        got: list[Any] = []  # noqa: RUF012  (one streamer)

        def put(self, tokens: torch.Tensor) -> None:
            self.got.append(tokens.tolist())

    first, second = requests([[5], [6]], stream=StreamRows(Streamer(), 2, 9))
    assert first.emit is not None
    assert second.ended is not None
    first.emit(1)
    second.ended()
    assert Streamer.got == [[1, 9]]
    (plain,) = requests([[5]])
    assert (plain.emit, plain.ended) == (None, None)


def test_limits_become_numbers_and_other_criteria_stay() -> None:
    class Own:
        pass

    own: Any = Own()
    request = DecodeRequest(np.array([1], np.int32), 0)
    criteria = StoppingCriteriaList(
        [MaxLengthCriteria(20), own, EosTokenCriteria([3, 4]), MaxLengthCriteria(12), EosTokenCriteria(5)]
    )
    set_limits(request, criteria, GenerationConfig(prefill_chunk_size=7), padding=2)
    assert (request.max_length, request.eos, request.prefill_chunk) == (10, {3, 4, 5}, 7)
    assert list(request.criteria) == [own]
    set_limits(request, StoppingCriteriaList(), GenerationConfig(max_length=9), padding=1)
    assert (request.max_length, request.eos) == (8, frozenset())


def test_each_reply_is_shared_at_its_end_and_each_prompt_once() -> None:
    shared: list[Any] = []

    class Store:
        def share(self, prompt: TokenArray, reply: TokenArray, share: str | None) -> None:
            shared.append((prompt.tolist(), reply.tolist(), share))

    store: Any = Store()
    found = requests([[5, 6], [5, 6], [7]])
    share_when_finished(store, found, "all")
    assert shared == []
    for number, request in enumerate(found):
        assert request.finished is not None
        request.finished(np.array([number], np.int32))
    assert shared == [([5, 6], [0], "all"), ([], [1], "all"), ([7], [2], "all")]
    (marked,) = requests([[5, 90, 6]])
    marked.placeholders = frozenset({90})
    share_when_finished(store, [marked], None)
    assert marked.finished is not None
    marked.finished(np.array([90, 7], np.int32))
    assert shared[3:] == [([5], [], None), ([6], [], None), ([], [7], None)], "7 does not continue 6"
    (alone,) = requests([[5]])
    share_when_finished(None, [alone], None)
    assert alone.finished is None
