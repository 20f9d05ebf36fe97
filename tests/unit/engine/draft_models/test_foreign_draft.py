"""Drafts across tokenizers: never wrong output, and right guesses where the texts agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.foreign_draft import ForeignModelDraft
from retrieval_draft.errors import InvalidInputError
from tests.support.drafters import near_ties
from tests.support.models import make
from tests.support.tokenizers_for_tests import byte_level, metaspace

TARGET = byte_level(("ab", "abc", "de"))
DRAFT = metaspace(("a", "ab", "abc", "f"))
FREE = ExpansionLimits(top_k=4, depth=4, entropy_stop=None)


def model_of(tokenizer: Any, name: str = "llama", seed: int = 0) -> Any:
    size = max(tokenizer.get_vocab().values()) + 1
    return make(name, vocab_size=size, seed=seed)


def prompt() -> torch.Tensor:
    return torch.tensor([TARGET("abc de fgh abc de ab")["input_ids"]])


@pytest.mark.parametrize("mode", ["intersection", "text"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_greedy_equals_generate(name: str, mode: Any) -> None:
    target, draft = model_of(TARGET, name), model_of(DRAFT, "llama", seed=5)
    source = ForeignModelDraft(draft, DRAFT, TARGET, mode, FREE)
    config = DraftConfig(nodes=12, sources=())
    drafter = RetrievalDrafter.for_model(target, TARGET, draft_model=source, config=config)
    stock = target.generate(prompt(), max_new_tokens=50, do_sample=False)
    ours = drafter.generate(prompt(), max_new_tokens=50, do_sample=False)
    assert near_ties(target, ours, stock) == 0
    assert drafter.stats.source_failures == 0
    assert drafter.stats.drafted_by_source["model"] > 0


def test_shared_tokens_are_proposed_with_their_share() -> None:
    draft = model_of(DRAFT)
    source = ForeignModelDraft(draft, DRAFT, TARGET, limits=ExpansionLimits(top_k=30, depth=1))
    text = "abc de"
    proposal = source.open(np.array(TARGET(text)["input_ids"], np.int32)).propose(40)
    with torch.no_grad():
        distribution = (
            draft(torch.tensor([DRAFT(text)["input_ids"]])).logits[0, -1].float().softmax(-1).numpy()
        )
    shared = {}
    for piece, number in DRAFT.get_vocab().items():
        mark = piece.replace("▁", "Ġ")
        if piece != "<eos>" and mark in TARGET.get_vocab():
            shared[TARGET.get_vocab()[mark]] = distribution[number]
    total = sum(shared.values())
    assert set(proposal.tokens.tolist()) == set(shared)
    for token, prob in zip(proposal.tokens.tolist(), proposal.probs.tolist(), strict=True):
        np.testing.assert_allclose(prob, shared[token] / total, rtol=1e-3)


def test_text_is_cut_anew_behind_the_last_tokens() -> None:
    source = ForeignModelDraft(model_of(DRAFT), DRAFT, TARGET, "text")
    behind = np.array(TARGET("de a")["input_ids"], np.int32)
    own = np.array(DRAFT("de a")["input_ids"], np.int32)
    drafted = np.array([DRAFT.get_vocab()[token] for token in ("d", "▁f", "g")], np.int32)
    cut = source.to_target(behind, own, drafted)
    assert TARGET.decode(cut.tolist()) == "d fg"


def test_a_text_that_would_have_been_cut_otherwise_drafts_nothing_false() -> None:
    source = ForeignModelDraft(model_of(DRAFT), DRAFT, TARGET, "text")
    behind = np.array([TARGET.get_vocab()["a"]], np.int32)
    own = np.array(DRAFT("a")["input_ids"], np.int32)
    # "a" and "b" join to one token of the target, which is not what stands there.
    assert len(source.to_target(behind, own, np.array([DRAFT.get_vocab()["b"]], np.int32))) == 0


def test_the_same_model_across_tokenizers_is_often_right() -> None:
    """The draft model's next letters are the target's: both are one model over the shared letters."""
    target = model_of(TARGET)
    draft = model_of(TARGET)
    source = ForeignModelDraft(draft, TARGET, TARGET, "intersection", FREE)
    drafter = RetrievalDrafter.for_model(
        target, TARGET, draft_model=source, config=DraftConfig(nodes=20, sources=())
    )
    drafter.generate(prompt(), max_new_tokens=60, do_sample=False)
    assert drafter.stats.tokens_per_step > 1.5


def test_a_pair_is_translated_or_not_as_its_tokenizer_asks() -> None:
    target = model_of(TARGET)
    for tokenizer, kind in ((DRAFT, "ForeignModelDraft"), (byte_level(("ab", "abc", "de")), "ModelDraft")):
        drafter = RetrievalDrafter.for_model(target, TARGET, draft_model=(model_of(tokenizer), tokenizer))
        names = [type(source).__name__ for source in drafter.draft_engine.sources]
        assert names[-1] == "PacedSource"
        assert type(drafter.draft_engine.sources[-1].source).__name__ == kind
    with pytest.raises(InvalidInputError, match="mode is"):
        ForeignModelDraft(model_of(DRAFT), DRAFT, TARGET, "letters")  # type: ignore[arg-type]
