"""Methods whose drafter is a trained head: exact, and the head drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.config import METHODS
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.head_files import load_head
from retrieval_draft.engine.draft_models.heads import HeadDraft
from retrieval_draft.engine.target import Target
from retrieval_draft.methods.registry import get_method
from tests.support.drafters import near_ties, prompt_ids
from tests.support.heads import write_head
from tests.support.models import make

NEW = 24
OF_THEIR_OWN = {"eagle3": "eagle3", "medusa": "medusa", "dflash": "dflash"}
"""A layout of each method that takes heads of one kind."""

WITH_ANY = ("opt_tree", "rasd", "cascade", "ouroboros", "sam_decoding")
CASES = [*OF_THEIR_OWN.items(), *((method, layout) for method in WITH_ANY for layout in ("eagle3", "medusa"))]


def test_every_method_with_a_head_is_tried() -> None:
    apart = {"mtp"}  # tests/unit/engine/draft_models/test_mtp.py
    assert OF_THEIR_OWN.keys() | apart == {name for name in METHODS if get_method(name).needs_head}


def drafter_of(model: Any, method: str, head: str) -> RetrievalDrafter:
    config = DraftConfig(method=method, cpu_kernels=False, prefix_cache_bytes=1 << 22)
    return RetrievalDrafter.for_model(model, draft_model=head, config=config)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(("method", "layout"), CASES)
def test_text_is_that_without_drafts(method: str, layout: str, name: str, tmp_path: Path) -> None:
    model = make(name)
    drafter = drafter_of(model, method, write_head(tmp_path, layout))
    prompts = torch.cat([prompt_ids(seed=seed) for seed in range(4)])
    stock = model.generate(prompts, max_new_tokens=NEW, do_sample=False)
    for _ in range(2):  # the second time from the prefix cache
        ours = drafter.generate(prompts, max_new_tokens=NEW, do_sample=False)
        assert sum(near_ties(model, ours[row : row + 1], stock[row : row + 1]) for row in range(4)) == 0
    assert drafter.stats.drafted > 0
    plain = RetrievalDrafter.for_model(model, config=DraftConfig("none", cpu_kernels=False))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "top_k": 0}
    for seed in range(2):
        texts = [
            each.generate(prompts[:1], seed=seed, num_return_sequences=3, **options)
            for each in (drafter, plain)
        ]
        assert torch.equal(*texts)
    assert drafter.stats.source_failures == 0


@torch.no_grad()
@pytest.mark.parametrize(
    "layout", ["eagle", "eagle3", "medusa", "hydra", "recurrent_drafting_drafter", "dflash"]
)
def test_a_review_has_the_probabilities_of_the_tree(layout: str, tmp_path: Path) -> None:
    model, text = make("llama"), np.arange(1, 12, dtype=np.int32)
    source = HeadDraft(load_head(write_head(tmp_path, layout), model))
    source.bind(Target(model))
    session = source.session(text, ExpansionLimits(depth=3, entropy_stop=None), 1)
    assert not session.review(np.array([5], np.int32)).numel(), "no state of the target is there"
    session.learn_hidden(torch.randn(len(text) - 1, 32 * len(source.head.layers)), 0)
    tree = session.propose(60)
    path = [int(np.flatnonzero(tree.parents >= 0)[-1])]
    while tree.parents[path[0]] >= 0:
        path.insert(0, int(tree.parents[path[0]]))
    logs = session.review(tree.tokens[path])
    levels = source.head.levels
    assert len(logs) == (len(path) + 1 if levels is None else min(levels, len(path) + 1))
    for row, node in zip(logs, path, strict=False):
        assert float(row[tree.tokens[node]].exp()) == pytest.approx(
            float(tree.probs[node]), rel=1e-3, abs=2e-6
        )
    assert len(session.review(np.array([5] * 9, np.int32))) == (10 if levels is None else levels)
    assert session.state.length == (len(text) - 1 if source.head.reads_all else 0)
