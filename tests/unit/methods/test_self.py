"""The method "self": the model drafts with layers skipped, on its own cache."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.draft_models.model_draft import SCORED, SelfDraft
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import make


def drafter(model: Any, **options: Any) -> RetrievalDrafter:
    return RetrievalDrafter.for_model(model, config=DraftConfig(method="self", nodes=6), **options)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_rows_of_a_batch_and_sibling_samples_draft_on_their_own_caches(name: str) -> None:
    model = make(name)
    rows = torch.cat([prompt_ids(seed=seed) for seed in range(3)])
    stock = model.generate(rows, max_new_tokens=40, do_sample=False)
    ours = drafter(model)
    assert near_ties(model, ours.generate(rows, max_new_tokens=40, do_sample=False), stock) == 0
    assert ours.stats.source_failures == 0
    assert ours.stats.accepted > 0
    options = {"max_new_tokens": 30, "do_sample": True, "seed": 3, "num_return_sequences": 3}
    plain = RetrievalDrafter.for_model(model, method="none").generate(rows[:1], **options)
    assert torch.equal(ours.generate(rows[:1], **options), plain)


def test_the_prompt_is_not_passed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass of the model beside the first is over a tree, none of them after a cache of its own."""
    model = make("llama")
    made: list[Any] = []
    original = Target.cache
    monkeypatch.setattr(
        Target, "cache", lambda self, *given, **named: made.append(self) or original(self, *given, **named)
    )
    ours = drafter(model, draft_model="self:1")
    ours.warm_up()
    made.clear()
    ours.generate(prompt_ids(), max_new_tokens=30, do_sample=False)
    assert made == [ours.target]
    assert ours.stats.drafted > 0


def test_with_captured_passes_it_has_a_cache_of_its_own() -> None:
    model = make("llama")
    config = DraftConfig(method="self", nodes=6, graphs="tape")
    ours = RetrievalDrafter.for_model(model, config=config)
    stock = model.generate(prompt_ids(), max_new_tokens=40, do_sample=False)
    assert near_ties(model, ours.generate(prompt_ids(), max_new_tokens=40, do_sample=False), stock) == 0
    assert ours.stats.accepted > 0


def test_the_layers_are_found_within_500_tokens_and_kept() -> None:
    """One layer of five does nothing: it is the one to skip, and drafts without it are always right."""
    model = make("llama", num_hidden_layers=5)
    with torch.no_grad():
        for part in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
            part.weight.zero_()
    ours = drafter(model)
    (source,) = ours.context.models
    assert isinstance(source, SelfDraft)
    assert not source.is_settled
    prompt, found = prompt_ids(), []
    for _ in range(2):
        ours.generate(prompt, max_new_tokens=250, do_sample=False)
        found.append((source.is_settled, source.skip))
    assert found[-1][0]
    assert 3 in source.skip
    before = source.skip
    ours.generate(prompt_ids(seed=5), max_new_tokens=2 * SCORED, do_sample=False)
    assert source.skip == before
    assert ours.last_stats is not None
    by_hand = drafter(model, draft_model="self:3")
    by_hand.generate(prompt_ids(seed=5), max_new_tokens=2 * SCORED, do_sample=False)
    assert by_hand.last_stats is not None
    # The distribution is flat, so that drafts are one token deep; all of the likeliest are right.
    assert by_hand.last_stats.tokens_per_step > 1.9


def test_its_own_cache_is_filled_anew_for_other_layers() -> None:
    draft = SelfDraft(make("llama", num_hidden_layers=6), (1,))
    prompt = np.arange(20, dtype=np.int32)
    session = draft.open(prompt)
    session.propose(4)
    session.observe(prompt[:2])
    draft.skip = (5,)
    fresh = draft.open(np.concatenate((prompt, prompt[:2])))
    assert session.propose(4).tokens.tolist() == fresh.propose(4).tokens.tolist()


def test_a_text_that_is_too_short_to_score_waits() -> None:
    draft = SelfDraft(make("llama", num_hidden_layers=6))
    session = draft.open(np.empty(0, np.int32))
    session.observe(np.arange(SCORED, dtype=np.int32))
    session.propose(4)
    before = draft.skip
    session.observe(np.arange(4, dtype=np.int32))
    assert not draft.is_settled
    assert before
    assert session.propose(4).tokens.size


def test_making_it_leaves_passes_of_other_threads_alone() -> None:
    model, errors = make("llama"), []
    ends = threading.Event()

    def use() -> None:
        while not ends.is_set():
            try:
                model(torch.zeros(1, 1, dtype=torch.int64))
            except Exception as error:
                errors.append(error)

    user = threading.Thread(target=use)
    user.start()
    try:
        for _ in range(20):
            SelfDraft(model, (1,))
    finally:
        ends.set()
        user.join()
    assert not errors


def test_layers_by_name() -> None:
    model = make("llama")
    (source,) = drafter(model, draft_model="self:1,2").context.models
    assert source.skip == (1, 2)
    assert source.is_settled
    for given in ("self:one", "self:9"):
        with pytest.raises(InvalidInputError):
            drafter(model, draft_model=given)


def test_another_model_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="names another one"):
        drafter(make("llama"), draft_model=make("llama", seed=7))
