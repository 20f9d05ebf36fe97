"""Finished rows in the shapes that model.generate gives them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

from retrieval_draft.engine.cache.cache_rows import CacheRows
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.generation.output import GenerateOutput, best_rows, make_output, pad_replies
from tests.support.models import CACHE, CONFIGS


def config(**options: Any) -> GenerationConfig:
    made = GenerationConfig(**options)
    made._pad_token_tensor = torch.tensor(9)
    return made


def row(reply: list[int], **sampler: Any) -> Any:
    """A finished row; without options its sampler kept nothing."""
    kept = {"scores": None, "logits": None, "logprobs": [], "logprob": 0.0, **sampler}
    return SimpleNamespace(
        text=SimpleNamespace(reply=np.array(reply, np.int32)),
        request=SimpleNamespace(sampler=SimpleNamespace(**kept)),
        prompt_logits=None,
        cache=SpeculativeCache(CONFIGS["llama"]()),
        target=SimpleNamespace(release=lambda cache: None),
    )


def column(*values: float) -> torch.Tensor:
    """A position's scores, shape (1, vocabulary)."""
    return torch.tensor([values])


IDS = torch.tensor([[0, 1, 2], [3, 4, 5]])


def test_replies_are_padded_to_the_longest() -> None:
    found = pad_replies(IDS, [torch.tensor([6]), torch.tensor([7, 8])], config())
    assert found.tolist() == [[0, 1, 2, 6, 9], [3, 4, 5, 7, 8]]


def test_without_a_pad_token_what_is_over_is_zero() -> None:
    found = pad_replies(IDS, [torch.tensor([6]), torch.tensor([7, 8])], GenerationConfig())
    assert found.tolist() == [[0, 1, 2, 6, 0], [3, 4, 5, 7, 8]]


def test_sequences_alone_are_a_tensor_of_int64() -> None:
    found = make_output([row([6]), row([7, 8])], IDS.int(), config())
    assert found.dtype == torch.int64
    assert found.tolist() == [[0, 1, 2, 6, 9], [3, 4, 5, 7, 8]]


def test_a_dictionary_has_what_was_kept_and_no_more() -> None:
    rows = [row([6])]
    found = make_output(rows, IDS[:1], config(return_dict_in_generate=True))
    assert type(found) is GenerateDecoderOnlyOutput
    assert found[CACHE] is rows[0].cache
    assert (found.scores, found.logits) == (None, None)


def test_scores_and_logits_come_position_by_position_with_zeros_after_a_row_s_end() -> None:
    rows = [
        row([6], scores=[column(1, 2)], logits=[column(5, 6)]),
        row([7, 8], scores=[column(3, 4), column(-1, 0)], logits=[column(7, 8), column(0, 1)]),
    ]
    found = make_output(rows, IDS, config(return_dict_in_generate=True))
    assert [each.tolist() for each in found.scores] == [[[1, 2], [3, 4]], [[0, 0], [-1, 0]]]
    assert [each.tolist() for each in found.logits] == [[[5, 6], [7, 8]], [[0, 0], [0, 1]]]
    assert isinstance(found[CACHE], CacheRows)
    assert found[CACHE].rows == tuple(each.cache for each in rows)


def test_prompt_logits_and_log_probabilities_have_a_place_where_they_were_asked_for() -> None:
    made = row([7, 8], logprobs=[-0.5, -1.0])
    made.prompt_logits = torch.ones(3, 2)
    found = make_output([made], IDS[:1], config(return_dict_in_generate=True))
    assert isinstance(found, GenerateOutput)
    assert [each.tolist() for each in found.logprobs] == [[-0.5, -1.0]]
    assert found.prompt_logits[0] is made.prompt_logits
    made.request.sampler.logprobs = []
    assert make_output([made], IDS[:1], config(return_dict_in_generate=True)).logprobs is None


def test_the_best_samples_of_each_prompt_by_their_mean() -> None:
    sums_and_lengths = [(-4, 2), (-4, 4), (-3, 1), (-2, 2), (-5, 1), (-8, 2)]
    rows = [row([1] * size, logprob=total) for total, size in sums_and_lengths]
    assert best_rows(rows, 3, 1) == [1, 3]
    assert best_rows(rows, 3, 2) == [1, 0, 3, 5]
    assert best_rows(rows, 6, 2) == [1, 3], "equal means in their order"
