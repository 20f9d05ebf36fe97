"""Tests of drafts after a text's first and last tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.compat import cache_parameter
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.window_draft import (
    SINKS,
    CacheWindow,
    WindowDraft,
    WindowSession,
)
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import make

NEW = 80
FREE = ExpansionLimits(top_k=4, depth=6, entropy_stop=None)


def drafter(model: Any, draft: Any, **options: Any) -> RetrievalDrafter:
    return RetrievalDrafter.for_model(
        model, draft_model=draft, config=DraftConfig(**{"nodes": 12, "sources": (), **options})
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt-neox", "mixtral"])
@pytest.mark.parametrize("graphs", ["off", "tape"])
def test_greedy_equals_generate(name: str, graphs: str) -> None:
    model = make(name)
    ours = drafter(model, WindowDraft(model, 6), graphs=graphs)
    for seed in (1, 2):
        prompt = prompt_ids(40, seed=seed)
        stock = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
        assert near_ties(model, ours.generate(prompt, max_new_tokens=NEW, do_sample=False), stock) == 0
    assert ours.stats.source_failures == 0
    assert ours.stats.accepted_by_source["model"] > 0


def test_a_seeded_sample_and_rows_of_a_batch_are_those_without_drafts() -> None:
    model, prompt = make("llama"), torch.cat([prompt_ids(40, seed=seed) for seed in (1, 2, 3)])
    ours, plain = drafter(model, "self:window=5", nodes=None), drafter(model, None, method="none")
    for options in ({"do_sample": False}, {"do_sample": True, "seed": 7, "temperature": 0.9}):
        want = plain.generate(prompt, max_new_tokens=NEW, **options)
        assert torch.equal(ours.generate(prompt, max_new_tokens=NEW, **options), want)
    assert ours.stats.source_failures == 0


def test_a_window_over_the_whole_text_is_accepted_to_the_end() -> None:
    model = make("gemma3")
    ours = drafter(model, WindowDraft(model, 500, FREE), nodes=60)
    ours.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False)
    assert ours.stats.tokens_per_step > 5  # a beam of 4 loses the greedy path now and then


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def filled(model: Any, length: int) -> tuple[Target, Any, torch.Tensor]:
    target, ids = Target(model, "off"), prompt_ids(length)
    cache = target.cache(length)
    for _ in target.append(cache, ids[0], 0):
        pass
    return target, cache, ids[0]


@pytest.mark.parametrize(("name", "window"), [("llama", 5), ("llama", 16), ("gemma3", 3), ("mistral", 20)])
def test_it_holds_the_keys_of_the_first_and_last_tokens_however_the_text_grows(
    name: str, window: int
) -> None:
    target, cache, _ = filled(make(name), 7)
    copies = CacheWindow(target, window)
    windows = [layer.window or 0 for layer in cache.attention_layers]
    window = max(window, *windows)
    rest, at = prompt_ids(220, seed=5)[0], 0
    for step in (1, 2, 1, 9, 3, 40, 1, 5, 100, 2, 4, 1):
        for _ in target.append(cache, rest[at : at + step], 7 + at):
            pass
        at += step
        copied = copies.follow(cache)
        end, size = cache.get_seq_length(), copied.get_seq_length()
        assert end + cache.shift == size + copied.shift
        assert min(end, SINKS + window) <= size <= SINKS + 2 * window
        for mine, its in zip(copied.attention_layers, cache.attention_layers, strict=True):
            for ours, theirs in ((mine.keys, its.keys), (mine.values, its.values)):
                assert ours is not None
                assert theirs is not None
                if its.window is None and size < end:
                    theirs = torch.cat([theirs[..., :SINKS, :], theirs[..., SINKS - size :, :]], -2)
                assert torch.equal(ours, theirs)


def test_a_pass_is_that_over_all_keys_with_those_between_hidden() -> None:
    model = make("llama")
    target, cache, ids = filled(model, 60)
    copied = CacheWindow(target, 10).follow(cache)
    found = target.verify_tree(copied, DraftTree.root(3), copied.get_seq_length())
    past: Any = DynamicCache()
    held = {cache_parameter(model): past}
    model(ids[None], **held)
    mask = torch.zeros(1, 1, 1, 61, dtype=torch.float32, device="cpu")
    mask[..., SINKS:50] = torch.finfo(torch.float32).min
    position = torch.tensor([[60]])
    want = model(torch.tensor([[3]]), attention_mask=mask, position_ids=position, **held).logits[0]
    assert torch.allclose(found, want, atol=1e-5)


def test_review_scores_a_chain_with_and_without_a_lent_cache() -> None:
    model = make("llama")
    _, cache, ids = filled(model, 22)
    session = WindowDraft(model, 500).open(prompt_ids(23)[0].numpy())
    chain = prompt_ids(3, seed=8)[0].numpy()
    alone = session.review(chain)
    assert torch.equal(ids, prompt_ids(23)[0][:22])
    assert isinstance(session, WindowSession)
    session.lend_cache(cache)
    assert torch.allclose(session.review(chain), alone, atol=1e-4)
    assert session.propose(4).tokens.size


@pytest.mark.parametrize(
    ("name", "told"),
    [("self:window=0", "at least 1"), ("self:window=", "draft_model is"), ("self:w", "draft")],
)
def test_windows_that_cannot_be_are_refused(name: str, told: str) -> None:
    with pytest.raises(InvalidInputError, match=told):
        drafter(make("llama"), name)
