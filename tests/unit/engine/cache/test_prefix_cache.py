"""Keys of earlier texts: the same text as without, bounded bytes, and nothing for others."""

from __future__ import annotations

import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine.cache.prefix_cache import PrefixCache, Prefixes
from retrieval_draft.engine.target import Target
from retrieval_draft.index.source import TokenArray
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import CONFIGS, ROPES, SWITCH, WINDOW, make

GREEDY = {"max_new_tokens": 8, "do_sample": False}


def drafter_of(model: Any, limit: int = 1 << 24, **options: Any) -> RetrievalDrafter:
    options = {"nodes": 4, "adjacency_rows": 1024, "prefix_cache_bytes": limit, **options}
    return RetrievalDrafter.for_model(model, config=DraftConfig(**options))


def known(drafter: RetrievalDrafter) -> int:
    assert drafter.last_stats is not None
    return drafter.last_stats.cached_tokens


def texts_of(model: Any, base: torch.Tensor) -> list[torch.Tensor]:
    """Texts with beginnings of many lengths in common, the same one, and one that goes on from a reply."""
    said = model.generate(base, **GREEDY)
    cuts = [n for n in (1, 9, 16, 17, 40, 64, 65, base.shape[1] - 1) if n < base.shape[1]]
    parted = [torch.cat([base[:, :n], prompt_ids(7, seed=n)], 1) for n in cuts]
    return [base, said, torch.cat([said, prompt_ids(9, seed=3)], 1), *parted, base[:, :-20]]


@pytest.mark.parametrize("name", ["llama", "qwen3-windowed", "gemma3", "mistral", "gpt2"])
def test_a_text_is_the_same_after_any_earlier_one(name: str) -> None:
    model, base = make(name), prompt_ids(90)
    drafter = drafter_of(model)
    assert torch.equal(drafter.generate(base, **GREEDY), model.generate(base, **GREEDY))
    assert known(drafter) == 0
    found = []
    for text in texts_of(model, base):
        assert near_ties(model, drafter.generate(text, **GREEDY), model.generate(text, **GREEDY)) == 0
        found.append(known(drafter))
    assert found[:3] == [89, 97, 98], "a second turn costs its new tokens"
    if name in ("llama", "gpt2"):
        assert found[3:] == [0, 9, 16, 17, 40, 64, 65, 89, 69]
    assert drafter.prefix_cache is not None
    assert drafter.prefix_cache.failures == 0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_seeded_samples_are_the_same(name: str) -> None:
    model, base = make(name), prompt_ids(60)
    drafter, plain = drafter_of(model), drafter_of(model, 0)
    options = {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 2, "seed": 5}
    for text in (base, base, torch.cat([base[:, :50], prompt_ids(4, seed=2)], 1)):
        assert torch.equal(drafter.generate(text, **options), plain.generate(text, **options))
    assert known(drafter) == 50 if name == "llama" else known(drafter) >= 0


@pytest.mark.parametrize("name", ["phi3", "llama-longrope"])
def test_keys_with_other_rotary_factors_are_not_taken(name: str) -> None:
    assert name in ROPES
    model, base = make(name), prompt_ids(SWITCH - 10)
    drafter = drafter_of(model)
    for text in (base, torch.cat([base, prompt_ids(30, seed=2)], 1), base, prompt_ids(SWITCH + 20), base):
        assert near_ties(model, drafter.generate(text, **GREEDY), model.generate(text, **GREEDY)) == 0
    assert known(drafter) == SWITCH - 11
    drafter.generate(prompt_ids(SWITCH + 20), **GREEDY)
    assert known(drafter) == 0


def test_changed_weights_and_adapters_know_nothing() -> None:
    peft = pytest.importorskip("peft")
    model, base = make("llama"), prompt_ids(40)
    drafter = drafter_of(model)
    drafter.generate(base, **GREEDY)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    layers = wrapped.base_model
    found = []
    for change in (None, None, layers.disable_adapter_layers, None, layers.enable_adapter_layers):
        if change is not None:
            change()
        assert torch.equal(drafter.generate(base, **GREEDY), model.generate(base, **GREEDY))
        found.append(known(drafter))
    assert found == [0, 39, 0, 39, 39], "each adapter has texts of its own"
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    assert torch.equal(drafter.generate(base, **GREEDY), model.generate(base, **GREEDY))
    assert known(drafter) == 0


def test_tenants_do_not_see_each_other() -> None:
    drafter = drafter_of(make("llama"))
    other = drafter.namespace("other", 1 << 20)
    drafter.generate(prompt_ids(40), **GREEDY)
    other.generate(prompt_ids(40), **GREEDY)
    assert known(other) == 0
    other.generate(prompt_ids(40), **GREEDY)
    assert known(other) == 39
    other.close()


def test_a_full_cache_keeps_the_newest_within_its_limit() -> None:
    model = make("gemma3")
    limit = 60_000
    drafter = drafter_of(model, limit)
    cache = drafter.prefix_cache
    assert cache is not None
    for seed in range(12):
        text = prompt_ids(40 + 9 * seed, seed=seed)
        assert torch.equal(drafter.generate(text, **GREEDY), model.generate(text, **GREEDY))
        assert cache.nbytes <= limit
    drafter.generate(text[:, :100], **GREEDY)
    assert cache.failures == 0
    drafter.generate(prompt_ids(40, seed=0), **GREEDY)
    assert known(drafter) == 0
    small = drafter_of(model, 1000)
    for _ in range(2):
        assert torch.equal(small.generate(text, **GREEDY), model.generate(text, **GREEDY))
    assert small.prefix_cache is not None
    assert (known(small), small.prefix_cache.nbytes) == (0, 0)


def test_an_error_costs_the_prefix_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, base = make("llama"), prompt_ids(40)
    drafter = drafter_of(model)
    cache = drafter.prefix_cache
    assert cache is not None
    drafter.generate(base, **GREEDY)

    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("no memory")

    for name in ("_find", "_copy_block"):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, fails)
            assert torch.equal(drafter.generate(base, **GREEDY), model.generate(base, **GREEDY))
    with monkeypatch.context() as patch:
        patch.setattr("retrieval_draft.engine.cache.kv_cache.SpeculativeLayer.fill", fails)
        assert torch.equal(drafter.generate(base, **GREEDY), model.generate(base, **GREEDY))
    assert cache.failures == 3
    held = cache.nbytes
    with monkeypatch.context() as patch:
        patch.setattr("retrieval_draft.engine.cache.prefix_cache._Layout.copy", fails)
        for seed in range(5):
            drafter.generate(prompt_ids(20, seed=seed + 5), **GREEDY)
    assert cache.nbytes <= held + 64 * 1024, "memory that was not used is used the next time"
    assert cache.failures == 8
    drafter.generate(base, **GREEDY)
    assert known(drafter) == 39


def test_a_callers_own_cache_and_prompt_logits_stay_as_they_are() -> None:
    model, base = make("llama"), prompt_ids(40)
    drafter = drafter_of(model)
    for _ in range(2):
        out = drafter.generate(base, return_dict_in_generate=True, output_prompt_logits=True, **GREEDY)
        assert out.prompt_logits[0].shape[0] == 40
        assert known(drafter) == 0
    again = drafter.generate(
        out.sequences, cache=out["cache" if "cache" in out else "past_key_values"], **GREEDY
    )
    assert torch.equal(again, model.generate(out.sequences, **GREEDY))


def passed(target: Target, prefixes: Prefixes, text: TokenArray) -> Any:
    cache = target.cache(len(text))
    for _ in target.prefill(cache, torch.from_numpy(text.astype(np.int64)), 1):
        pass
    prefixes.keeper(cache).extend(text, len(text))
    return cache


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_what_is_given_is_what_was_kept(name: str) -> None:
    assert name in CONFIGS
    target = Target(make(name))
    cache = PrefixCache(target, 1 << 24)
    prefixes = cache.prefixes("")
    assert prefixes is not None
    text = prompt_ids(100)[0].numpy().astype(np.int32)
    own = passed(target, prefixes, text)
    cache.work(0.0)
    first = prefixes.find(text)
    assert first is None or first.length < 99, "one block at a time"
    cache.work()
    prefix = prefixes.find(np.append(text, 0).astype(np.int32))
    assert prefix is not None
    assert prefix.length == 100
    given = target.cache(120)
    for _ in prefix.fill(given):
        cache.work()
    assert given.get_seq_length() == 100
    for mine, theirs in zip(given.layers, own.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)
        assert mine.window is None or mine.keys.shape[-2] == WINDOW - 1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("limit", [90_000, 1 << 22])
@torch.no_grad()
def test_keys_after_any_history_are_those_of_a_cold_prompt(name: str, limit: int) -> None:
    draw = random.Random(limit)
    target = Target(make(name))
    cache = PrefixCache(target, limit)
    texts = [prompt_ids(64, seed=seed)[0].numpy().astype(np.int32) for seed in range(2)]
    hits = 0
    for number in range(40):
        begin = draw.choice(texts)
        end = prompt_ids(draw.randint(2, 40), seed=number)[0].numpy().astype(np.int32)
        text = np.concatenate([begin[: draw.randint(0, len(begin))], end])
        prefixes = cache.prefixes(draw.choice("ab"))
        assert prefixes is not None
        prefix = prefixes.find(text)
        own = target.cache(len(text))
        if prefix is not None:
            hits += 1
            for _ in prefix.fill(own):
                cache.work(0.0)  # may evict what is not in use
            cold = target.cache(len(text))
            *_, _ = target.prefill(cold, torch.from_numpy(text[: prefix.length].astype(np.int64)), 1)
            assert own.get_seq_length() == prefix.length < len(text)
            for mine, theirs in zip(own.layers, cold.layers, strict=True):
                torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)
        keeper = prefixes.keeper(own)
        for _ in target.prefill_passes(
            own, torch.from_numpy(text[own.get_seq_length() :].astype(np.int64)), 1, 17
        ):
            keeper.extend(text, own.get_seq_length())
            cache.work(0.0 if draw.random() < 0.5 else None)
        texts.append(text)
        assert cache.nbytes <= limit
    assert hits > 4
    assert cache.failures == 0


def prefixes_of(target: Target, limit: int = 1 << 24) -> Prefixes:
    prefixes = PrefixCache(target, limit).prefixes("")
    assert prefixes is not None
    return prefixes


@torch.no_grad()
def test_texts_that_wait_hold_no_more_than_the_limit() -> None:
    """Nothing is copied meanwhile, as where requests end faster than their keys are copied."""
    target = Target(make("llama"))
    texts = [prompt_ids(40, seed=seed)[0].numpy().astype(np.int32) for seed in range(8)]
    each = passed(target, prefixes_of(target), texts[0]).nbytes
    prefixes = prefixes_of(target, 3 * each)
    caches = [weakref.ref(passed(target, prefixes, text)) for text in texts]
    assert [cache() is not None for cache in caches] == [False] * 5 + [True] * 3
    prefixes.cache.work()
    assert [prefixes.find(text) is not None for text in texts] == [False] * 5 + [True] * 3


@torch.no_grad()
def test_a_text_larger_than_the_limit_waits_alone() -> None:
    target = Target(make("llama"))
    prefixes = prefixes_of(target, 1)
    caches = [
        weakref.ref(passed(target, prefixes, prompt_ids(40)[0].numpy().astype(np.int32))) for _ in range(2)
    ]
    assert [cache() is not None for cache in caches] == [False, True]


def test_close_gives_the_memory_back() -> None:
    drafter = drafter_of(make("gemma3"), 60_000)
    other = drafter.namespace("other", 1 << 20)
    for seed in range(3):
        other.generate(prompt_ids(90, seed=seed), **GREEDY)
    cache = drafter.prefix_cache
    assert cache is not None
    layout = cache._layouts[0]
    layout.spare.append(layout.allocate())  # as of a removed block
    other.close()
    assert cache.nbytes > 0, "others of the same model use it"
    drafter.close()
    assert cache.nbytes == 0
    assert not layout.spare
