from __future__ import annotations

import torch

from benchmarks.loop import time_steps
from retrieval_draft import DraftConfig, RetrievalDrafter
from tests.support.models import make


def test_parts_of_a_step_add_up() -> None:
    drafter = RetrievalDrafter.for_model(make("llama"), config=DraftConfig(nodes=4))
    found = time_steps(drafter, [torch.arange(1, 9)[None], torch.arange(9, 20)[None]], tokens=12)
    drafter.close()
    assert found["steps"] >= 4
    assert 0 < found["nodes"] <= 4
    parts = [found[f"{name}_us"] for name in ("learn", "draft", "commit", "accept")]
    assert all(part > 0 for part in parts)
    assert max(parts) < found["loop_us"]
