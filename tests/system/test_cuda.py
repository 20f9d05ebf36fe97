"""The same equalities on a real CUDA device."""

from __future__ import annotations

import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from tests.drafters import drafter_with, near_ties, prompt_ids, reply_of
from tests.models import CONFIGS, make
from tests.sources import OracleSource

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_stock(name: str, attention: str) -> None:
    model, prompt = make(name, attention=attention).cuda(), prompt_ids().cuda()
    stock = model.generate(prompt, max_new_tokens=60, do_sample=False)
    for nodes in (1, 8, 60):
        drafter = drafter_with(model, OracleSource(reply_of(stock, prompt)), nodes=nodes)
        near_ties(model, drafter.generate(prompt, max_new_tokens=60, do_sample=False), stock)
        assert drafter.stats.accepted > 0


def test_seeded_sampling_equals_undrafted() -> None:
    model, prompt = make("llama").cuda(), prompt_ids().cuda()
    plain = RetrievalDrafter.for_model(model, method="none")
    reply = plain.generate(prompt, max_new_tokens=40, do_sample=True, seed=1)
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(nodes=16))
    assert torch.equal(drafter.generate(prompt, max_new_tokens=40, do_sample=True, seed=1), reply)
