"""The memory of a cache is known before it is made."""

from __future__ import annotations

import pytest
import torch

from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine.cache.footprint import CacheFootprint
from tests.support.chain_models import KNOWN, make_family
from tests.support.drafters import prompt_ids
from tests.support.models import make


@pytest.mark.parametrize("name", ["llama", "gemma3", *(name for name in ("lfm2",) if name in KNOWN)])
def test_it_is_about_what_the_cache_of_a_long_text_holds(name: str) -> None:
    target = RetrievalDrafter.for_model(make_family(name) if name == "lfm2" else make(name)).target
    with torch.no_grad():
        footprint = CacheFootprint(target)
        for length in (40, 160, 400):
            cache = target.cache(length)
            for _ in target.prefill(cache, prompt_ids(length)[0], 1):
                pass
            assert 0.95 * cache.nbytes <= footprint.bytes(length) <= 1.3 * cache.nbytes
