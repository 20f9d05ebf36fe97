"""The memory of a cache is known before it is made."""

from __future__ import annotations

import pytest
import torch

from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.engine.cache.footprint import CacheFootprint
from retrieval_draft.engine.graph.arena import slot_bytes
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


def test_passes_of_one_shape_take_whole_pages() -> None:
    """However much more they take where nothing limits them."""
    target = RetrievalDrafter.for_model(make("gemma3"), config=DraftConfig(exact="bitwise")).target
    with torch.no_grad():
        footprint, cache = CacheFootprint(target), target.cache(9)
        for _ in target.prefill(cache, prompt_ids(9)[0], 1):
            pass
        each = slot_bytes(cache)
        assert [footprint.bytes(tokens) for tokens in (1, 256, 257)] == [256 * each, 256 * each, 512 * each]
