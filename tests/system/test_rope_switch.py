"""Rotary factors that depend on the longest position of a pass: rows say what they say alone, undrafted."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Phi3ForCausalLM, PhimoeForCausalLM

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.drafting.stats import DraftStats
from tests.support.batches import padded, ragged
from tests.support.drafters import prompt_ids
from tests.support.models import CACHE, ROPES, SWITCH, VOCABULARY, make

LENGTHS = tuple(range(SWITCH - 3, SWITCH + 4))
NEW = 14
NAMES = [*ROPES, "llama"]
RENEWING = ("phi3", "phi3-windowed", "phimoe")
"""Models that get all keys anew where the text outgrows the switch."""

GROWING = ("llama-dynamic", "gemma3-dynamic")
"""Models whose frequencies change with every token beyond the switch; their prompts may be no longer."""


def forgets(model: Any) -> bool:
    """True if this version's `generate` drops the cache and passes the last token alone."""
    known = inspect.getsource(type(model).prepare_inputs_for_generation)
    return type(model) in (Phi3ForCausalLM, PhimoeForCausalLM) and "next_sequence_length" not in known


def stock(name: str, prompt: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """The greedy text of a model that has passed nothing before; of whole passes where `generate` forgets."""
    return _stock(name, tuple(prompt[0].tolist()), new)


@cache
def _stock(name: str, tokens: tuple[int, ...], new: int) -> torch.Tensor:
    model = new_model(name)
    prompt = text = torch.tensor([tokens])
    if forgets(model):
        with torch.no_grad():
            for _ in range(new):
                best = model(text, use_cache=False).logits[:, -1].argmax(-1)
                text = torch.cat([text, best[None]], 1)
        return text
    out: torch.Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False
    )
    return out


def new_model(name: str) -> Any:
    error = _error_of(name)
    if error is not None:
        pytest.skip(f"transformers cannot run this model: {error!r}")
    return make(name)


@cache
def _error_of(name: str) -> Exception | None:
    """Of two long passes: PhiMoE, and LongRoPE by type of layer, raise in transformers 5.0."""
    model = make(name)
    try:
        with torch.no_grad():
            for _ in range(2):
                model(prompt_ids(SWITCH + 1))
    except (AttributeError, UnboundLocalError) as error:
        return error
    return None


def drafter_of(model: Any, **options: Any) -> RetrievalDrafter:
    return RetrievalDrafter.for_model(
        model, config=DraftConfig(**{"nodes": 10, "cpu_kernels": False, **options})
    )


def lengths(name: str) -> tuple[int, ...]:
    """Lengths of prompts around the switch."""
    return tuple(length for length in LENGTHS if name not in GROWING or length <= SWITCH)


def guesses(text: torch.Tensor, length: int, wrong: int = 5) -> list[list[int]]:
    """The reply to a prompt of `length` tokens with every `wrong`-th token another, and right throughout."""
    reply = text[0, length:].tolist()
    bad = [
        (token + 1) % VOCABULARY if position % wrong == 0 else token
        for position, token in enumerate(reply, 1)
    ]
    return [bad, text[0, length - 8 :].tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_around_the_switch(name: str) -> None:
    model = new_model(name)
    drafter, plain = drafter_of(model), drafter_of(model, method="none")
    accepted = 0
    for length in (SWITCH - 12, *lengths(name)):
        prompt = prompt_ids(length, seed=length)
        text = stock(name, prompt)
        for documents in (guesses(text, length), None):
            found = drafter.generate(prompt, documents=documents, max_new_tokens=NEW, do_sample=False)
            assert torch.equal(found, text), (length, documents)
            assert drafter.last_stats is not None
            accepted += drafter.last_stats.accepted
        for chunk in (None, 7, SWITCH - 1):
            found = plain.generate(prompt, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=chunk)
            assert torch.equal(found, text), (length, chunk)
    assert accepted > 3 * len(lengths(name)), "drafts are verified on both sides"


@pytest.mark.parametrize("name", NAMES)
def test_a_seeded_text_is_that_of_the_seed_undrafted(name: str) -> None:
    model = new_model(name)
    drafter, plain = drafter_of(model), drafter_of(model, method="none")
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.8, "num_return_sequences": 2}
    for length in lengths(name):
        prompt = prompt_ids(length, seed=length)
        text = plain.generate(prompt, seed=length, **options)
        documents = [guess for row in text for guess in guesses(row[None], length)]
        assert torch.equal(drafter.generate(prompt, seed=length, documents=documents, **options), text)


@pytest.mark.parametrize("method", ["calibrated", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_on_both_sides_say_what_they_say_alone(name: str, method: str) -> None:
    sizes = (10, SWITCH - 6, SWITCH - 1, SWITCH)
    sizes += () if name in GROWING else (SWITCH + 1, SWITCH + 30)
    prompts = ragged(sizes)
    texts = [stock(name, prompt) for prompt in prompts]
    drafter = drafter_of(new_model(name), method=method)
    ids, mask = padded(prompts)
    documents = [guess for text, size in zip(texts, sizes, strict=True) for guess in guesses(text, size)]
    found = drafter.generate(
        ids, mask, documents=documents, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    for row, text in zip(found, texts, strict=True):
        assert torch.equal(row[-NEW:], text[0, -NEW:])


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_join_a_running_batch(name: str) -> None:
    sizes = (SWITCH - 8, SWITCH, 5, SWITCH - 2) + (() if name in GROWING else (SWITCH + 9,))
    prompts = ragged(sizes)
    drafter = drafter_of(new_model(name))
    rows: list[Any] = []
    with drafter.continuous.running() as batch:
        for prompt in prompts:
            text = stock(name, prompt)
            prepared = drafter.continuous.prepare(
                prompt, documents=guesses(text, prompt.shape[1]), max_new_tokens=NEW, do_sample=False
            )
            stats = [DraftStats()]
            (drafting,) = drafter.continuous.open(prepared, stats)
            prepared.requests[0].prefill_chunk = 11
            rows.append((text, batch.join(prepared.requests[0], drafting, stats[0])))
            batch.step()
            batch.leave()
        while batch.rows:
            batch.step()
            batch.leave()
    for text, row in rows:
        assert row.text.tokens.tolist() == text[0].tolist()


def turns(name: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Lengths of a first prompt, and what is asked next: longer, cut or another, over the switch or not."""
    for first in (SWITCH - 30, SWITCH - NEW, SWITCH - NEW + 1, SWITCH - 5, SWITCH + 3):
        if name in GROWING and first > SWITCH:
            continue
        begun = stock(name, prompt_ids(first, seed=first))
        total = begun.shape[1]
        for cut, more in (
            (total, 1),
            (total, 25),
            (SWITCH - 9, 4),
            (SWITCH - 9, 30),
            (total - 1, 0),
            (0, 20),
        ):
            text = torch.cat([begun[:, :cut], prompt_ids(more, seed=more + 1)], 1)
            if name not in GROWING or text.shape[1] <= SWITCH:
                yield first, text


def continued(name: str, first: int, text: torch.Tensor) -> torch.Tensor:
    """Stock's reply to `text` with the cache of its reply to the first prompt."""
    if name in RENEWING:
        return stock(name, text)
    model, prompt = new_model(name), prompt_ids(first, seed=first)
    cache = DynamicCache(config=model.config)
    begun = model.generate(prompt, **{CACHE: cache}, max_new_tokens=NEW, do_sample=False)
    if text.shape[1] <= begun.shape[1] or not torch.equal(text[:, : begun.shape[1]], begun):
        return stock(name, text)
    out: torch.Tensor = model.generate(
        text, attention_mask=torch.ones_like(text), **{CACHE: cache}, max_new_tokens=NEW, do_sample=False
    )
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_handed_on_over_the_switch_in_either_direction(name: str) -> None:
    model = new_model(name)
    drafter = drafter_of(model)
    options = {"max_new_tokens": NEW, "do_sample": False}
    for first, text in turns(name):
        prompt = prompt_ids(first, seed=first)
        cache = drafter.generate(prompt, return_dict_in_generate=True, **options)[CACHE]
        wanted = continued(name, first, text)
        documents = guesses(wanted, text.shape[1])
        found = drafter.generate(text, cache=cache, documents=documents, **options)
        assert torch.equal(found, wanted), (first, text.shape[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_of_transformers_handed_on_over_the_switch(name: str) -> None:
    model = new_model(name)
    if forgets(model):
        pytest.skip("generate forgets the text")
    drafter = drafter_of(model)
    options = {"max_new_tokens": NEW, "do_sample": False}
    for order in ("sd", "ds", "dd"):
        for first, text in turns(name):
            prompt = prompt_ids(first, seed=first)
            begun = stock(name, prompt)
            if text.shape[1] <= begun.shape[1] or not torch.equal(text[:, : begun.shape[1]], begun):
                continue
            model, cache = new_model(name), DynamicCache(config=model.config)
            how = {"s": model.generate, "d": drafter.generate}
            how[order[0]](prompt, **{CACHE: cache}, **options)
            found = how[order[1]](text, **{CACHE: cache}, **options)
            assert torch.equal(found, continued(name, first, text)), (order, first, text.shape[1])


@pytest.mark.parametrize("name", RENEWING)
def test_rows_of_a_stock_cache_whose_longest_row_was_beyond(name: str) -> None:
    model, prompts = new_model(name), ragged((20, SWITCH + 5))
    ids, mask = padded(prompts)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=True)
    more = torch.cat([ids, prompt_ids(3).repeat(2, 1)], 1)
    mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = drafter_of(model).generate(more, mask, cache=out[CACHE], **options)
    for row, prompt in zip(found, prompts, strict=True):
        text = torch.cat([prompt, prompt_ids(3)], 1)
        assert torch.equal(row[-5:], stock(name, text, 5)[0, -5:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [SWITCH - 4, SWITCH + 20])
def test_a_cache_that_a_failed_call_left(name: str, length: int) -> None:
    if name in GROWING and length > SWITCH:
        pytest.skip("longer than the model allows")
    drafter = drafter_of(new_model(name))
    options = {"max_new_tokens": NEW, "do_sample": False}
    cache = drafter.generate(prompt_ids(20), return_dict_in_generate=True, **options)[CACHE]

    def stop(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > length + 8:
            raise RuntimeError("enough")
        return scores

    with pytest.raises(RuntimeError, match="enough"):
        drafter.generate(prompt_ids(length, seed=5), cache=cache, logits_processor=[stop], **options)
    for prompt in (prompt_ids(20), prompt_ids(length, seed=5), prompt_ids(SWITCH - 2, seed=5)):
        assert torch.equal(drafter.generate(prompt, cache=cache, **options), stock(name, prompt))


@pytest.mark.parametrize("name", NAMES)
def test_prompt_logits_are_those_of_one_pass(name: str) -> None:
    model = new_model(name)
    for length in lengths(name):
        prompt = prompt_ids(length, seed=length)
        out = drafter_of(model).generate(
            prompt, max_new_tokens=1, do_sample=False, prefill_chunk_size=9,
            return_dict_in_generate=True, output_prompt_logits=True,
        )  # fmt: skip
        with torch.no_grad():
            wanted = model(prompt, use_cache=False).logits[0]
        torch.testing.assert_close(out.prompt_logits[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", GROWING)
def test_frequencies_that_grew_in_one_call_are_not_those_of_the_next(name: str) -> None:
    model = new_model(name)
    drafter = drafter_of(model)
    options = {"max_new_tokens": NEW, "do_sample": False}
    prompts = [prompt_ids(length, seed=length) for length in (SWITCH - 4, SWITCH, 9)]
    with torch.no_grad():
        model(prompt_ids(3 * SWITCH))
    for prompt in prompts:
        assert torch.equal(drafter.generate(prompt, **options), stock(name, prompt))
    fresh = new_model(name)
    drafter = drafter_of(fresh)
    drafter.generate(prompts[1], max_new_tokens=3 * NEW, do_sample=False)
    assert torch.equal(fresh.generate(prompts[0], **options), stock(name, prompts[0]))
