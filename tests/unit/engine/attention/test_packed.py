"""One pass over several requests' trees says what a pass for each says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine.attention.packed import PACKED_ATTENTION
from retrieval_draft.engine.target import Target
from tests.support.batches import ragged
from tests.support.models import CONFIGS, WINDOW, make
from tests.support.trees import tree_of

TREES = [
    ([5, 6, 7, 8], [-1, 0, 0, 1]),
    ([9], [-1]),
    ([1, 2, 3, 4, 5], [-1, 0, 1, 2, 3]),
    ([3, 4], [-1, 0]),
]
LENGTHS = (3, WINDOW + 5, 40, WINDOW)


@torch.no_grad()
def setting(model: Any) -> tuple[Target, list[Any], list[DraftTree]]:
    target = Target(model)
    caches = []
    for prompt in ragged(LENGTHS):
        caches.append(target.cache(64))
        for _ in target.prefill(caches[-1], prompt[0], 1):
            pass
    return target, caches, [tree_of(tokens, parents) for tokens, parents in TREES]


@torch.no_grad()
def together(target: Target, caches: list[Any], trees: list[DraftTree]) -> torch.Tensor:
    attentions = [target.attention_of_row() for _ in trees]
    inputs = [a.prepare(t, n) for a, t, n in zip(attentions, trees, LENGTHS, strict=True)]
    return target.verify_rows(caches, inputs)


@torch.no_grad()
def one_by_one(target: Target, caches: list[Any], trees: list[DraftTree]) -> torch.Tensor:
    parts = []
    for cache, tree, length in zip(caches, trees, LENGTHS, strict=True):
        parts.append(target.verify_tree(cache, tree, length).clone())
    return torch.cat(parts)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_one_by_one(name: str, attention: str) -> None:
    target, caches, trees = setting(make(name, attention=attention))
    packed = together(target, caches, trees)
    paths = [[0, 1, 3], [0], [0, 1, 2], [0]]
    for cache, path in zip(caches, paths, strict=True):
        assert cache.get_seq_length() in LENGTHS
        kept = 0
        while kept < len(path) and path[kept] == kept:
            kept += 1
        cache.drop()
    torch.testing.assert_close(packed, one_by_one(target, caches, trees), atol=2e-5, rtol=2e-5)
    text = target.model.config.get_text_config(decoder=True)
    assert text._attn_implementation == attention, "given back"


@pytest.mark.parametrize("name", CONFIGS)
def test_committed_paths_are_what_plain_text_leaves(name: str) -> None:
    model = make(name)
    target, caches, trees = setting(model)
    together(target, caches, trees)
    caches[0].commit(torch.tensor([3]), 2, 3)
    caches[1].commit(None, 1, 1)
    caches[2].commit(None, 4, 4)
    caches[3].commit(None, 2, 2)
    texts = [[5, 6, 8], [9], [1, 2, 3, 4], [3, 4]]
    for cache, prompt, more in zip(caches, ragged(LENGTHS), texts, strict=True):
        whole = torch.cat([prompt, torch.tensor([[*more, 11]])], 1)
        with torch.no_grad():
            logits = target.verify_tree(cache, DraftTree.root(11), whole.shape[1] - 1)[0]
            torch.testing.assert_close(logits, model(whole).logits[0, -1], atol=2e-5, rtol=2e-5)


def test_a_layer_that_attends_in_its_own_way_is_noticed() -> None:
    model = make("llama")
    target, caches, trees = setting(model)
    expected = one_by_one(target, caches, trees)
    for cache in caches:
        cache.drop()
    layer = model.model.layers[1].self_attn
    ordinary = layer.forward

    def own_way(*args: Any, **kwargs: Any) -> Any:
        before = model.config._attn_implementation
        model.config._attn_implementation = "sdpa"  # as a layer that does not look it up
        try:
            return ordinary(*args, **kwargs)
        finally:
            model.config._attn_implementation = before

    layer.forward = own_way
    torch.testing.assert_close(together(target, caches, trees), expected, atol=2e-5, rtol=2e-5)
    assert target._rows_by == target._joined
    assert model.config._attn_implementation == "sdpa" != PACKED_ATTENTION


def test_an_error_in_a_pass_gives_the_attention_back() -> None:
    model = make("llama")
    target, caches, trees = setting(model)
    handle = model.model.layers[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        together(target, caches, trees)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    for cache in caches:
        cache.drop()
    expected = one_by_one(target, caches, trees)
    for cache in caches:
        cache.drop()
    torch.testing.assert_close(together(target, caches, trees), expected, atol=2e-5, rtol=2e-5)
    assert np.isfinite(expected.numpy()).all()
