"""Drafts change speed, never output: every architecture, attention and budget against model.generate."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.target import tolerance
from tests.support.drafters import drafter_with, near_ties, prompt_ids, reply_of
from tests.support.models import CACHE, CONFIGS, make
from tests.support.sources import OracleSource

NEW = 60
BUDGETS = (1, 8, 64)


@functools.cache
def reference(name: str, attention: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    model, prompt = make(name, attention=attention), prompt_ids()
    return model, prompt, model.generate(prompt, max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("nodes", BUDGETS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_right_wrong_and_mixed_trees_leave_the_text_as_it_is(name: str, attention: str, nodes: int) -> None:
    model, prompt, stock = reference(name, attention)
    drafter = drafter_with(model, OracleSource(reply_of(stock, prompt)), nodes=nodes)
    ours = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False)
    assert near_ties(model, ours, stock) == 0
    assert drafter.stats.tokens_per_step > 1.2


@pytest.mark.parametrize("nodes", [8, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_wholly_wrong_trees_leave_the_text_as_it_is(name: str, nodes: int) -> None:
    model, prompt, stock = reference(name, "sdpa")
    drafter = drafter_with(model, OracleSource((), seed=3), nodes=nodes)
    assert near_ties(model, drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), stock) == 0


@pytest.mark.parametrize("nodes", [0, *BUDGETS])
@pytest.mark.parametrize("name", CONFIGS)
def test_own_sources_leave_the_text_as_it_is(name: str, nodes: int) -> None:
    model, prompt, stock = reference(name, "sdpa")
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(nodes=nodes))
    for _ in range(2):  # the second time with what the first has taught
        assert near_ties(model, drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), stock) == 0
    assert drafter.stats.source_failures == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_method_none_is_plain_decoding(name: str) -> None:
    model, prompt, stock = reference(name, "sdpa")
    drafter = RetrievalDrafter.for_model(model, method="none")
    assert torch.equal(drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), stock)
    assert drafter.stats.steps == NEW - 1


def test_budget_chosen_by_cost_leaves_the_text_as_it_is() -> None:
    model, prompt, stock = reference("gemma3", "sdpa")
    drafter = RetrievalDrafter.for_model(model)
    assert near_ties(model, drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), stock) == 0


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_long_text_beyond_many_windows_stays_equal_and_memory_bounded(name: str) -> None:
    model = make(name)
    prompt = prompt_ids(40)
    stock = model.generate(prompt, max_new_tokens=440, do_sample=False)
    drafter = drafter_with(model, OracleSource(reply_of(stock, prompt)), nodes=16)
    out = drafter.generate(prompt, max_new_tokens=440, do_sample=False, return_dict_in_generate=True)
    assert near_ties(model, out.sequences, stock) == 0
    sliding = [layer for layer in out[CACHE].layers if layer.is_sliding]
    assert sliding
    assert all(layer.capacity < 400 for layer in sliding)


@pytest.mark.parametrize("chunk", [5, 16, 64])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunked_prefill(name: str, chunk: int) -> None:
    model, prompt = make(name), prompt_ids(70)
    stock = model.generate(prompt, max_new_tokens=30, do_sample=False)
    drafter = drafter_with(model, OracleSource(reply_of(stock, prompt)))
    ours = drafter.generate(prompt, max_new_tokens=30, do_sample=False, prefill_chunk_size=chunk)
    assert near_ties(model, ours, stock) == 0


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gpt2"])
def test_token_zero_is_a_token_like_any_other(name: str) -> None:
    prompt = prompt_ids()
    for seed in range(20):  # the weights of a seed differ between versions of transformers
        model = make(name, seed=seed)
        stock = model.generate(prompt, max_new_tokens=100, do_sample=False)
        if 0 in reply_of(stock, prompt):
            break
    assert 0 in reply_of(stock, prompt)
    for nodes in (1, 8):
        drafter = drafter_with(model, OracleSource(reply_of(stock, prompt), wrong=0.0), nodes=nodes)
        ours = drafter.generate(prompt, max_new_tokens=100, do_sample=False)
        assert near_ties(model, ours, stock) == 0


def test_vocabulary_above_65536() -> None:
    size = 70_001
    model = make("llama", vocab_size=size, num_hidden_layers=1)
    prompt = torch.cat([prompt_ids(10, size), torch.tensor([[70_000, 4464]])], 1)
    stock = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert max(reply_of(stock, prompt)) > 65_536
    drafter = drafter_with(model, OracleSource(reply_of(stock, prompt), vocabulary=size))
    assert near_ties(model, drafter.generate(prompt, max_new_tokens=20, do_sample=False), stock) == 0
    assert drafter.stats.accepted > 0


def test_half_precision_says_what_is_best_but_for_rounding() -> None:
    model, prompt = make("llama").to(torch.bfloat16), prompt_ids()
    stock = model.generate(prompt, max_new_tokens=40, do_sample=False)
    drafter = drafter_with(model, OracleSource(reply_of(stock, prompt), wrong=0.3))
    ours = drafter.generate(prompt, max_new_tokens=40, do_sample=False)
    assert ours.shape == stock.shape
    assert drafter.stats.accepted > 0
    with torch.no_grad():
        logits = model(ours).logits[0, prompt.shape[1] - 1 : -1].float()
    chosen = logits.gather(1, ours[0, prompt.shape[1] :, None])[:, 0]
    # A wrong token, or one after wrong keys, is a standard deviation and more below the best.
    assert ((logits.amax(-1) - chosen) / logits.std(-1)).max() < tolerance(torch.bfloat16)
