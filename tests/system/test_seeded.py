"""A seeded run returns token for token what the same seed returns without drafts."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from tests.support.batches import padded, ragged
from tests.support.drafters import drafter_with, reply_of
from tests.support.models import make
from tests.support.sources import OracleSource

ARCHITECTURES = ("llama", "qwen3-windowed", "gemma3", "gpt-neox", "mixtral", "gpt2")
GRID = list(product((0.3, 0.7, 1.0, 1.3), (0.8, 1.0), (1.0, 1.2)))
NEW = 32


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drafted_equals_undrafted_over_the_grid(name: str) -> None:
    model, prompts = make(name), ragged((9, 23, 40))
    ids, mask = padded(prompts)
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(nodes=12))
    plain = RetrievalDrafter.for_model(model, method="none")
    for seed, (temperature, top_p, penalty) in enumerate(GRID):
        options = {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0,
            "repetition_penalty": penalty,
            "max_new_tokens": NEW,
            "pad_token_id": 0,
            "seed": seed,
        }
        drafted = drafter.generate(ids, mask, **options)
        assert torch.equal(drafted, plain.generate(ids, mask, **options)), (temperature, top_p, penalty)
        alone = plain.generate(prompts[2], torch.ones_like(prompts[2]), **options)
        assert torch.equal(drafted[2, ids.shape[1] :], alone[0, prompts[2].shape[1] :])
    assert drafter.stats.accepted > 0
    assert drafter.stats.tokens_per_step > 1.1


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.1},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 0.01},
        {"eta_cutoff": 0.01},
        {"top_k": 5},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"bad_words_ids": [[3], [5, 6]]},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 20, "eos_token_id": 7},
        {"sequence_bias": [[[4], 2.0]]},
        {"renormalize_logits": True, "top_p": 0.7},
        {"exponential_decay_length_penalty": (4, 1.1), "eos_token_id": 7},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_processor_sees_each_nodes_own_prefix(options: dict[str, Any]) -> None:
    model, prompt = make("llama"), ragged((23,))[0]
    given = {"do_sample": True, "max_new_tokens": NEW, "seed": 5, "pad_token_id": 0, "top_k": 0, **options}
    plain = RetrievalDrafter.for_model(model, method="none").generate(prompt, **given)
    # A source that knows most of the reply makes for deep trees.
    for wrong in (0.0, 0.3):
        drafter = drafter_with(model, OracleSource(reply_of(plain, prompt), wrong=wrong))
        assert torch.equal(drafter.generate(prompt, **given), plain)
        assert drafter.stats.tokens_per_step > 1.5
