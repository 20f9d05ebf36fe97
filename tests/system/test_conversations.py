"""Caches handed in and back, and the logits of prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError
from tests.support.batches import padded, ragged
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import CACHE, CONFIGS, make


def drafter_of(model: Any, **options: Any) -> RetrievalDrafter:
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(**{"nodes": 6, **options}))
    drafter.warm_up()
    return drafter


def fed(model: Any) -> list[int]:
    """Grows by the number of tokens of each pass."""
    sizes: list[int] = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_three_turns_with_the_returned_cache(name: str) -> None:
    model = make(name)
    drafter, sizes = drafter_of(model), fed(model)
    text, cache = prompt_ids(30), None
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    for turn in range(3):
        del sizes[:]
        out = drafter.generate(text, cache=cache, **options)
        assert sizes[0] <= (30 if turn == 0 else 8), "only what is new is passed through"
        assert cache is None or out[CACHE] is cache, "continued in place"
        assert near_ties(model, out.sequences, model.generate(text, max_new_tokens=20, do_sample=False)) == 0
        cache = out[CACHE]
        text = torch.cat([out.sequences, prompt_ids(7, seed=turn + 9)], 1)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_an_edited_conversation_is_right_too(name: str) -> None:
    model = make(name)
    drafter = drafter_of(model)
    options = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    first = drafter.generate(prompt_ids(30), **options)
    edited = first.sequences.clone()
    edited[0, 12] = (edited[0, 12] + 1) % 97
    for text in (edited, edited[:, :20], prompt_ids(5, seed=8)):
        cache = drafter.generate(prompt_ids(30), **options)[CACHE]
        again = drafter.generate(text, cache=cache, **options)
        stock = model.generate(text, max_new_tokens=20, do_sample=False)
        assert near_ties(model, again.sequences, stock) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_of_transformers_goes_in_and_comes_back(name: str) -> None:
    model, prompt = make(name), prompt_ids(40)
    cache = DynamicCache(config=model.config)
    begun = model.generate(prompt, **{CACHE: cache}, max_new_tokens=5, do_sample=False)
    text = torch.cat([begun, prompt_ids(6, seed=4)], 1)
    stock = model.generate(text, max_new_tokens=20, do_sample=False)
    drafter = drafter_of(model)
    sizes = fed(model)
    ours = drafter.generate(text, cache=cache, max_new_tokens=20, do_sample=False)
    assert sizes[0] == 7
    assert near_ties(model, ours, stock) == 0
    assert cache.get_seq_length() == ours.shape[1] - 1, "the caller's own cache is continued, as by stock"
    longer = torch.cat([ours, prompt_ids(4, seed=6)], 1)
    assert near_ties(
        model,
        model.generate(longer, **{CACHE: cache}, max_new_tokens=9, do_sample=False),
        model.generate(longer, max_new_tokens=9, do_sample=False),
    ) == 0  # fmt: skip


def test_an_empty_cache_of_transformers_is_filled() -> None:
    model, prompt = make("llama"), prompt_ids(12)
    cache = DynamicCache(config=model.config)
    out = model.generate(
        prompt, **{CACHE: cache}, max_new_tokens=8, do_sample=False,
        custom_generate=drafter_of(model).custom_generate,
    )  # fmt: skip
    assert torch.equal(out, model.generate(prompt, max_new_tokens=8, do_sample=False))
    assert cache.get_seq_length() == 19


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_caches_of_a_batch(name: str) -> None:
    model, prompts = make(name), ragged()[:3]
    ids, mask = padded(prompts)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    drafter = drafter_of(model)
    first = drafter.generate(ids, mask, **options)
    assert len(first[CACHE].rows) == 3
    more = torch.cat([first.sequences, prompt_ids(4, seed=2).repeat(3, 1)], 1)
    mask = torch.cat([mask, torch.ones(3, 16, dtype=torch.long)], 1)
    sizes = fed(model)
    again = drafter.generate(more, mask, cache=first[CACHE], **options)
    assert max(sizes[:3]) <= 8
    fresh = drafter_of(model).generate(more, mask, **options)
    assert torch.equal(again.sequences, fresh.sequences)
    stock = DynamicCache(config=model.config)
    begun = model.generate(ids, attention_mask=padded(prompts)[1], **{CACHE: stock}, max_new_tokens=12,
                           do_sample=False, pad_token_id=0)  # fmt: skip
    assert torch.equal(begun, first.sequences)
    taken = drafter.generate(more, mask, cache=stock, **options)
    assert torch.equal(taken.sequences, fresh.sequences)


def test_samples_go_on_from_one_cache() -> None:
    model, prompt = make("llama"), prompt_ids(20)
    drafter = drafter_of(model)
    begun = drafter.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    text = torch.cat([begun.sequences, prompt_ids(3, seed=3)], 1)
    options = {"max_new_tokens": 15, "do_sample": True, "num_return_sequences": 3, "seed": 9}
    out = drafter.generate(text, cache=begun[CACHE], **options)
    assert torch.equal(out, drafter_of(model).generate(text, **options))


def test_what_cannot_be_continued_says_so() -> None:
    model = make("llama")
    drafter = drafter_of(model)
    ids, mask = padded(ragged()[:2])
    begun = drafter.generate(
        ids, mask, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )
    with pytest.raises(InvalidInputError, match="holds 2 rows; there are 1 prompts"):
        drafter.generate(prompt_ids(9), cache=begun[CACHE], max_new_tokens=3)
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(UnsupportedGenerationError, match="StaticCache"):
        drafter.generate(prompt_ids(9), cache=static, max_new_tokens=3)
    cache = DynamicCache(config=model.config)
    model.generate(prompt_ids(30), **{CACHE: cache}, max_new_tokens=3, do_sample=False)
    with pytest.raises(InvalidInputError, match="whole text"):
        drafter.generate(prompt_ids(9), cache=cache, max_new_tokens=3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prompt_logits_are_those_of_the_model(name: str) -> None:
    model, prompts = make(name), ragged()[:3]
    ids, mask = padded(prompts)
    out = drafter_of(model).generate(
        ids, mask, max_new_tokens=4, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_prompt_logits=True,
    )  # fmt: skip
    for prompt, logits in zip(prompts, out.prompt_logits, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, model(prompt).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "full-first"])
@pytest.mark.parametrize("more", [60, 3])
def test_a_conversation_edited_where_a_window_has_left_it(name: str, more: int) -> None:
    kinds = {"layer_types": ["full_attention", *["sliding_attention"] * 2]} if name == "full-first" else {}
    model = make("gemma3" if kinds else name, **kinds)
    drafter = drafter_of(model)
    options = {"max_new_tokens": 12, "do_sample": False}
    begun = drafter.generate(prompt_ids(300), return_dict_in_generate=True, **options)
    text = torch.cat([begun.sequences[:, :-60], prompt_ids(4, seed=3)], 1)
    for _ in range(2):  # the cache stays right whether or not it could be continued
        ours = drafter.generate(text, cache=begun[CACHE], **options)
        assert near_ties(model, ours, model.generate(text, **options)) == 0
        text = torch.cat([ours, prompt_ids(more, seed=4)], 1)


def test_a_cache_that_a_failed_call_left_is_right() -> None:
    model, prompt = make("llama"), prompt_ids(30)
    drafter = drafter_of(model)
    options = {"max_new_tokens": 12, "do_sample": False}
    cache = drafter.generate(prompt, return_dict_in_generate=True, **options)[CACHE]

    def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 50:
            raise RuntimeError("enough")
        return scores

    with pytest.raises(RuntimeError, match="enough"):
        drafter.generate(prompt_ids(45, seed=5), cache=cache, logits_processor=[stop], **options)
    for text in (prompt, prompt_ids(60, seed=6), prompt_ids(45, seed=5)):
        ours = drafter.generate(text, cache=cache, **options)
        assert near_ties(model, ours, model.generate(text, **options)) == 0


@pytest.mark.parametrize("order", ["dd", "ds", "sd", "sds", "ssd"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_a_cache_of_transformers_without_a_configuration(name: str, order: str) -> None:
    model, text, cache = make(name), prompt_ids(19), DynamicCache()
    drafter = drafter_of(model)
    options = {"max_new_tokens": 12, "do_sample": False}
    for turn, who in enumerate(order):
        stock = model.generate(text, **options)
        found = (drafter if who == "d" else model).generate(text, **{CACHE: cache}, **options)
        assert near_ties(model, found, stock) == 0
        assert cache.get_seq_length() == stock.shape[1] - 1
        text = torch.cat([stock, prompt_ids(3, seed=turn)], 1)


@pytest.mark.parametrize("order", ["dd", "ds", "sd"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_of_transformers_and_a_padded_prompt(name: str, order: str) -> None:
    model = make(name)
    how = {"d": drafter_of(model).generate, "s": model.generate}
    text = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt_ids(11)], 1)
    mask = (torch.arange(15) >= 4).long()[None]
    cache, options = (
        DynamicCache(config=model.config),
        {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0},
    )
    for who in order:
        stock = model.generate(text, attention_mask=mask, **options)
        found = how[who](text, attention_mask=mask, **{CACHE: cache}, **options)
        assert torch.equal(found, stock)
        text = torch.cat([stock, prompt_ids(3, seed=7)], 1)
        mask = torch.cat([mask, torch.ones(1, text.shape[1] - mask.shape[1], dtype=torch.long)], 1)


@pytest.mark.parametrize("kept", [-25, 20])
def test_a_cache_cut_and_extended_elsewhere_is_not_taken_for_what_it_was(kept: int) -> None:
    model = make("llama")
    drafter = drafter_of(model)
    options = {"max_new_tokens": 12, "do_sample": False}
    begun = drafter.generate(prompt_ids(33), return_dict_in_generate=True, **options)
    cache = begun[CACHE]
    assert cache.get_seq_length() == 44
    cache.crop(kept)  # tokens off the end, or as before transformers 5.23 the tokens that stay
    left = 19 if kept < 0 else 20
    assert cache.get_seq_length() == left
    assert cache.text.tolist() == begun.sequences[0, :left].tolist()
    with torch.no_grad():
        model(prompt_ids(40, seed=8)[:, left:], **{CACHE: cache})
    text = begun.sequences
    ours = drafter.generate(text, cache=cache, **options)
    assert near_ties(model, ours, model.generate(text, **options)) == 0
    cache.reset()
    assert cache.get_seq_length() == len(cache.text) == 0
