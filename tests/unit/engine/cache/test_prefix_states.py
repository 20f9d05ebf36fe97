"""States of models without trees, at the ends of prompts and texts."""

from __future__ import annotations

import pytest
import torch

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from tests.support.chain_models import KNOWN, make_family
from tests.support.drafters import near_ties, prompt_ids

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("name", [name for name in ("qwen3_next", "lfm2", "bloom") if name in KNOWN])
def test_a_text_goes_on_from_an_earlier_one(name: str) -> None:
    model, base = make_family(name), prompt_ids(40)
    config = DraftConfig(nodes=4, adjacency_rows=1024, prefix_cache_bytes=1 << 22)
    drafter = RetrievalDrafter.for_model(model, config=config)
    cache, found = drafter.prefix_cache, []
    assert cache is not None
    first = drafter.generate(base, **GREEDY)
    for text in (
        base,
        first,
        torch.cat([base, prompt_ids(4, seed=2)], 1),
        prompt_ids(30, seed=9),
        base[:, :20],
    ):
        ours = drafter.generate(text, **GREEDY)
        assert near_ties(model, ours, model.generate(text, **GREEDY)) == 0
        assert drafter.last_stats is not None
        found.append(drafter.last_stats.cached_tokens)
    assert found == ([39, 47, 40, 0, 19] if name == "bloom" else [0, 47, 40, 0, 0])
    assert 0 < cache.nbytes <= 1 << 22
    assert cache.failures == 0
    held = cache.nbytes
    cache._states._max_bytes = held // 2  # type: ignore[union-attr]
    drafter.generate(prompt_ids(50, seed=7), **GREEDY)
    assert 0 < cache.nbytes <= held // 2
    cache.clear()
    assert cache.nbytes == 0


@pytest.mark.skipif("deepseek_v32" not in KNOWN, reason="this transformers has no such model")
def test_a_model_that_is_left_out_names_the_reason() -> None:
    config = DraftConfig(nodes=4, adjacency_rows=1024, prefix_cache_bytes=1 << 22)
    drafter = RetrievalDrafter.for_model(make_family("deepseek_v32"), config=config)
    assert drafter.prefix_cache is not None
    assert "at once" in drafter.prefix_cache.refusal
    drafter.generate(prompt_ids(20), **GREEDY)
    assert drafter.prefix_cache.nbytes == 0
