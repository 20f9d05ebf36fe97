"""The joint distribution of several tokens of a real model, with drafts of every kind, over many samples."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from tests.support.distributions import chi_square_z, excess_variation
from tests.support.drafters import prompt_ids
from tests.support.models import make

VOCABULARY = 5
TOKENS = 4


def distribution_of(model: Any, prompt: torch.Tensor, temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of each sequence of `TOKENS` tokens, from the plain model."""
    replies = torch.tensor(list(product(range(VOCABULARY), repeat=TOKENS)))
    text = torch.cat([prompt.expand(len(replies), -1), replies], 1)
    with torch.no_grad():
        logs = (model(text).logits[:, prompt.shape[1] - 1 : -1] / temperature).log_softmax(-1)
    probs = logs.gather(-1, replies[..., None])[..., 0].sum(1).exp()
    return {tuple(reply): float(prob) for reply, prob in zip(replies.tolist(), probs, strict=True)}


@pytest.mark.parametrize(
    ("draft", "samples", "rounds"), [(None, 400, 8), ("self", 100, 8)], ids=["lookups", "lookups-and-model"]
)
def test_samples_follow_the_law_of_the_model(draft: str | None, samples: int, rounds: int) -> None:
    model, prompt = make("llama", vocab_size=VOCABULARY, initializer_range=0.3), prompt_ids(9, VOCABULARY)
    distribution = distribution_of(model, prompt, 0.9)
    config = DraftConfig(nodes=12, top_k=4)
    drafter = RetrievalDrafter.for_model(model, config=config, draft_model=draft)
    drawn: list[tuple[int, ...]] = []
    for seed in range(rounds):
        out = drafter.generate(
            prompt, max_new_tokens=TOKENS, do_sample=True, temperature=0.9, top_k=0, seed=seed,
            num_return_sequences=samples,
        )  # fmt: skip
        drawn += [tuple(reply) for reply in out[:, prompt.shape[1] :].tolist()]
    assert drafter.stats.tokens_per_step > 1.3, "drafts were taken"
    assert drafter.stats.drafted > 3 * drafter.stats.steps, "trees had several children"
    assert chi_square_z(drawn, distribution) < 3.5
    assert excess_variation(drawn, distribution) < 1.3
    assert chi_square_z(drawn, distribution_of(model, prompt, 1.3)) > 5, (
        "so many samples tell temperatures apart"
    )
