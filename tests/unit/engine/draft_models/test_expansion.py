"""Draft models' trees against logits of whole texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retrieval_draft.engine.draft_models.expansion import Expansion, ExpansionLimits, ModelTree
from retrieval_draft.engine.target import Target
from tests.support.drafters import prompt_ids
from tests.support.models import make

ALL = ExpansionLimits(top_k=3, depth=4, entropy_stop=None)
TEXT = prompt_ids(40)[0].numpy().astype(np.int32)


def distribution(model: torch.nn.Module, text: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0, -1].float().softmax(-1)


def paths(tree: ModelTree) -> list[list[int]]:
    found: list[list[int]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        found.append([*(found[parent] if parent >= 0 else []), token])
    return found


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt2"])
@pytest.mark.parametrize("slack", [0, 5])
def test_probabilities_are_the_models_own_on_each_path(name: str, slack: int) -> None:
    model = make(name)
    expansion = Expansion(Target(model), ALL, slack=slack)
    for end in (10, 11, 14, 40):  # the cache follows the text
        text = TEXT[:end]
        tree = expansion.grow(text, 20)
        for path, prob in zip(paths(tree), tree.probs, strict=True):
            expected = distribution(model, [*text.tolist(), *path[:-1]])[path[-1]]
            np.testing.assert_allclose(prob, float(expected), rtol=2e-3)


def test_the_best_nodes_are_kept_and_parents_come_first() -> None:
    model = make("llama")
    expansion = Expansion(Target(model), ALL)
    large, small = (expansion.grow(TEXT, budget) for budget in (60, 6))
    assert np.all(large.parents < np.arange(len(large.tokens)))
    products = [float(np.prod([p])) for p in _products(large)]
    assert products == sorted(products, reverse=True)
    assert paths(small) == paths(large)[:6]


def _products(tree: ModelTree) -> list[float]:
    out: list[float] = []
    for parent, prob in zip(tree.parents.tolist(), tree.probs.tolist(), strict=True):
        out.append(prob * (out[parent] if parent >= 0 else 1.0))
    return out


def test_a_chain_is_the_greedy_text() -> None:
    model = make("gemma3")
    chain = Expansion(Target(model), ExpansionLimits(top_k=1, depth=6, entropy_stop=None)).grow(TEXT, 6)
    stock = model.generate(torch.tensor(TEXT[None].astype(np.int64)), max_new_tokens=6, do_sample=False)
    assert chain.tokens.tolist() == stock[0, len(TEXT) :].tolist()
    assert chain.parents.tolist() == [-1, 0, 1, 2, 3, 4]


def test_uncertain_nodes_are_not_expanded() -> None:
    model = make("llama")
    limits = ExpansionLimits(top_k=3, depth=4, entropy_stop=1e-6)
    tree = Expansion(Target(model), limits).grow(TEXT, 60)
    assert len(tree.tokens) == 3
    assert np.all(tree.parents == -1)


def test_a_level_that_gains_little_is_the_last() -> None:
    model = make("llama")
    limits = ExpansionLimits(top_k=3, depth=6, entropy_stop=None, gain_stop=10.0)
    assert np.all(Expansion(Target(model), limits).grow(TEXT, 60).parents == -1)


def test_only_allowed_tokens_are_drafted_and_share_their_mass() -> None:
    model = make("llama")
    allowed = torch.zeros(97, dtype=torch.bool)
    allowed[[4, 9]] = True
    tree = Expansion(Target(model), ALL).grow(TEXT, 60, allowed)
    assert set(tree.tokens.tolist()) <= {4, 9}
    np.testing.assert_allclose(tree.probs[tree.parents == -1].sum(), 1, rtol=1e-4)


def test_another_text_starts_the_cache_anew() -> None:
    model = make("llama")
    expansion = Expansion(Target(model), ALL)
    expansion.grow(TEXT, 8)
    other = TEXT[::-1].copy()
    np.testing.assert_array_equal(
        expansion.grow(other, 8).tokens, Expansion(Target(model), ALL).grow(other, 8).tokens
    )


def test_a_long_text_enters_in_runs() -> None:
    model = make("mistral")
    text = prompt_ids(300)[0].numpy().astype(np.int32)
    tree = Expansion(Target(model), ALL).grow(text, 3)
    np.testing.assert_allclose(tree.probs[0], float(distribution(model, text.tolist()).max()), rtol=2e-3)


def test_review_gives_the_law_after_each_guess() -> None:
    model = make("llama")
    expansion = Expansion(Target(model), ALL)
    logs = expansion.review(TEXT[:20], np.array([5, 6], np.int32))
    assert logs.shape == (3, 97)
    for size, guesses in enumerate(([], [5], [5, 6])):
        expected = distribution(model, [*TEXT[:20].tolist(), *guesses]).log()
        np.testing.assert_allclose(logs[size].numpy(), expected.numpy(), atol=2e-3)
    assert expansion.review(TEXT[:21], np.empty(0, np.int32)).shape == (1, 97)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_text_that_goes_back_continues_what_is_still_the_same(name: str) -> None:
    model = make(name)
    target = Target(model)
    expansion = Expansion(target, ALL)
    expansion.grow(TEXT[:30], 8)
    cache = expansion._cache
    other = np.concatenate((TEXT[:26], TEXT[:2]))
    tree = expansion.grow(other, 20)
    assert expansion._cache is cache
    expected = Expansion(target, ALL).grow(other, 20)
    np.testing.assert_array_equal(tree.tokens, expected.tokens)
    np.testing.assert_allclose(tree.probs, expected.probs, rtol=2e-3)


def test_a_sure_level_is_expanded_where_the_model_is_uncertain() -> None:
    limits = ExpansionLimits(top_k=3, depth=2, entropy_stop=1e-6)
    tree = Expansion(Target(make("llama")), limits).grow(TEXT, 60, sure=1)
    assert max(len(path) for path in paths(tree)) == 2
