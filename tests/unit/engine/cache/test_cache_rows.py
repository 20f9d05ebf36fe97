"""Caches from one call to the next: what is taken over, what is copied, what is given back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from retrieval_draft.engine.cache.cache_rows import CacheRows, adopt, write_back
from retrieval_draft.engine.cache.kv_cache import SpeculativeCache
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError
from tests.support.models import CACHE, WINDOW, make

MODEL = make("llama")
TARGET = Target(MODEL)
WINDOWED = make("mistral")
WINDOWED_TARGET = Target(WINDOWED)
TEXT = np.arange(10, 30, dtype=np.int32)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def read(text: np.ndarray, target: Target = TARGET) -> SpeculativeCache:
    """A cache that holds a text and knows it, as a finished request leaves it."""
    cache = target.cache(len(text))
    list(target.prefill(cache, torch.from_numpy(text.astype(np.int64)), 1))
    cache.text = text.copy()
    return cache


def stock(text: np.ndarray, model: Any = MODEL, padding: int = 0, with_config: bool = True) -> DynamicCache:
    """The cache that transformers itself makes of a text."""
    cache = DynamicCache(config=model.config) if with_config else DynamicCache()
    ids = torch.from_numpy(np.concatenate([np.zeros(padding, np.int64), text.astype(np.int64)]))[None]
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}, use_cache=True)
    return cache


def goes_on(cache: SpeculativeCache, text: np.ndarray, target: Target = TARGET) -> torch.Tensor:
    """Logits after a text, of which the cache holds the beginning."""
    left = torch.from_numpy(text[cache.get_seq_length() :].astype(np.int64))
    assert len(left) >= 1
    (logits,) = target.prefill(cache, left, 1)
    return logits[0]


def fresh(text: np.ndarray, model: Any = MODEL) -> torch.Tensor:
    logits: torch.Tensor = model(torch.from_numpy(text.astype(np.int64))[None]).logits[0, -1]
    return logits


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def edited(at: int) -> np.ndarray:
    text = TEXT.copy()
    text[at] += 50
    return text


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        (np.append(TEXT, [5, 6]), 20),
        (TEXT, 19),
        (edited(12), 12),
        (edited(0), 0),
        (edited(19), 19),
        (TEXT[:7], 6),
    ],
    ids=["longer", "equal", "edited", "another", "edited at the end", "shorter"],
)
def test_of_our_own_cache_what_the_prompt_shares_is_kept(prompt: Any, kept: int) -> None:
    given = read(TEXT)
    (cache,) = adopt(given, [prompt], [0], TARGET)
    assert cache is given
    assert cache.get_seq_length() == kept
    same(goes_on(cache, prompt), fresh(prompt))


def test_text_that_a_cache_does_not_know_is_not_believed() -> None:
    given = read(TEXT)
    list(TARGET.append(given, torch.tensor([77, 78]), 20))  # by somebody else
    (cache,) = adopt(given, [np.append(TEXT, [1, 2, 3])], [0], TARGET)
    assert cache.get_seq_length() == 20
    same(goes_on(cache, np.append(TEXT, [1, 2, 3])), fresh(np.append(TEXT, [1, 2, 3])))


def test_nodes_that_a_failed_pass_left_are_dropped() -> None:
    given = read(TEXT)
    given.stage(True)
    TARGET._call(given, torch.tensor([[70, 71]]), torch.tensor([[20, 21]]), None, 1)
    given.stage(False)
    (cache,) = adopt(given, [np.append(TEXT, 5)], [0], TARGET)
    same(goes_on(cache, np.append(TEXT, 5)), fresh(np.append(TEXT, 5)))


def test_where_a_window_has_left_the_shared_part_the_text_is_read_anew() -> None:
    text = np.arange(400, dtype=np.int32) % 90
    given = read(text, WINDOWED_TARGET)
    prompt = text[:30]
    (cache,) = adopt(given, [prompt], [0], WINDOWED_TARGET)
    assert cache is not given
    assert cache.get_seq_length() == 0
    same(goes_on(cache, prompt, WINDOWED_TARGET), fresh(prompt, WINDOWED))


def test_rows_are_those_of_the_batch_in_order() -> None:
    prompts = [np.append(TEXT, 5), np.append(edited(3), 6)]
    given = CacheRows([read(TEXT), read(edited(3)[:10])])
    assert given.get_seq_length() == 20
    assert given.nbytes == sum(row.nbytes for row in given.rows)
    caches = adopt(given, prompts, [0, 0], TARGET)
    assert [cache.get_seq_length() for cache in caches] == [20, 10]
    for cache, prompt in zip(caches, prompts, strict=True):
        same(goes_on(cache, prompt), fresh(prompt))


@pytest.mark.parametrize(
    "given",
    [lambda: read(TEXT), lambda: CacheRows([read(TEXT)] * 3), lambda: stock(TEXT)],
    ids=["ours", "rows", "stock"],
)
def test_other_rows_than_the_prompts_are_refused(given: Any) -> None:
    with pytest.raises(InvalidInputError, match="rows; there are 2 prompts"):
        adopt(given(), [np.append(TEXT, 5)] * 2, [0, 0], TARGET)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("model", "target"), [(MODEL, TARGET), (WINDOWED, WINDOWED_TARGET)], ids=["full", "window"]
)
def test_a_cache_of_transformers_is_copied_without_its_padding(
    model: Any, target: Target, with_config: bool, padding: int
) -> None:
    given = stock(TEXT, model, padding, with_config)
    before = given.layers[0].keys.clone()
    prompt = np.append(TEXT, [5, 6])
    (cache,) = adopt(given, [prompt], [padding], target)
    assert cache.get_seq_length() == 20
    same(goes_on(cache, prompt, target), fresh(prompt, model))
    assert torch.equal(given.layers[0].keys, before), "the caller's stays as it is"


def test_a_cache_of_more_text_than_the_prompt_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="holds 20 tokens, the prompt has 7"):
        adopt(stock(TEXT), [TEXT[:7]], [0], TARGET)


def test_an_empty_cache_of_transformers_begins_each_row_anew() -> None:
    caches = adopt(DynamicCache(config=MODEL.config), [TEXT, TEXT[:5]], [0, 15], TARGET)
    assert [cache.get_seq_length() for cache in caches] == [0, 0]
    assert caches[0] is not caches[1]


def test_other_caches_are_refused() -> None:
    with pytest.raises(UnsupportedGenerationError, match="StaticCache"):
        adopt(StaticCache(config=MODEL.config, max_cache_len=8), [TEXT], [0], TARGET)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("model", "target"), [(MODEL, TARGET), (WINDOWED, WINDOWED_TARGET)], ids=["full", "window"]
)
@pytest.mark.parametrize("length", [6, WINDOW + 4])
def test_what_is_given_back_is_what_transformers_would_have_made(
    model: Any, target: Target, padding: int, length: int
) -> None:
    text = TEXT[:length]
    given = DynamicCache(config=model.config)
    write_back(read(text, target), given, padding)
    wanted = stock(text, model, padding)
    assert given.get_seq_length() == wanted.get_seq_length() == length + padding
    for mine, theirs in zip(given.layers, wanted.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape
        for found, like in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            real = min(length, found.shape[-2])
            torch.testing.assert_close(found[:, :, -real:], like[:, :, -real:], atol=1e-5, rtol=1e-4)
            assert not found[:, :, : found.shape[-2] - real].any()
