"""Every published method is exact here, also those whose own code is not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.bench.compare import lookup_methods
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import make

NEW = 60


@functools.cache
def reference(name: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    model, prompt = make(name), prompt_ids()
    return model, prompt, model.generate(prompt, max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("method", lookup_methods())
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "mixtral"])
def test_greedy_equals_generate(name: str, method: str) -> None:
    model, prompt, stock = reference(name)
    for nodes in (None, 5):
        drafter = RetrievalDrafter.for_model(model, config=DraftConfig(method=method, nodes=nodes))
        for _ in range(2):  # the second time with what the first has taught
            ours = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False)
            assert near_ties(model, ours, stock) == 0
        assert drafter.stats.source_failures == 0
        assert drafter.stats.drafted > 0 or method == "rest"


@pytest.mark.parametrize("method", ["opt_tree", "rasd", "cascade", "ouroboros"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_methods_with_a_draft_model_are_exact_too(name: str, method: str) -> None:
    model, prompt, stock = reference(name)
    for draft, nodes in (("self", None), (make("llama", seed=7, num_hidden_layers=1), 6)):
        drafter = RetrievalDrafter.for_model(
            model, draft_model=draft, config=DraftConfig(method=method, nodes=nodes)
        )
        for _ in range(2):
            ours = drafter.generate(prompt, max_new_tokens=NEW, do_sample=False)
            assert near_ties(model, ours, stock) == 0
        assert drafter.stats.source_failures == 0
        assert drafter.stats.drafted > 0


def test_a_cascade_of_two_draft_models_is_exact() -> None:
    model, prompt, stock = reference("llama")
    drafter = RetrievalDrafter.for_model(
        model, draft_model=["self", make("llama", seed=7, num_hidden_layers=1)], method="cascade"
    )
    assert near_ties(model, drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), stock) == 0
    assert drafter.stats.source_failures == 0
    assert drafter.stats.drafted > 0


@pytest.mark.parametrize("method", lookup_methods())
def test_a_seeded_sample_equals_the_same_seed_without_drafts(method: str) -> None:
    model, prompt, _ = reference("llama")
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    plain = RetrievalDrafter.for_model(model, method="none").generate(prompt, **options)
    assert torch.equal(RetrievalDrafter.for_model(model, method=method).generate(prompt, **options), plain)


def test_published_sizes_hold_unless_others_are_asked_for() -> None:
    model, prompt, _ = reference("llama")
    sizes = {}
    for nodes in (None, 3):
        drafter = RetrievalDrafter.for_model(model, config=DraftConfig(method="prompt_lookup", nodes=nodes))
        drafter.generate(prompt, max_new_tokens=NEW, do_sample=False)
        sizes[nodes] = max(drafter.stats.nodes)
    assert sizes == {None: 10, 3: 3}
