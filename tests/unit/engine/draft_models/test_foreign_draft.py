"""Drafts across tokenizers: never wrong output, and right guesses where the texts agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, ModelTree
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
    source = ForeignModelDraft(draft, DRAFT, TARGET, "intersection", ExpansionLimits(top_k=30, depth=1))
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


def chain(*tokens: str) -> ModelTree:
    ids = np.array([DRAFT.get_vocab()[token] for token in tokens], np.int32)
    return ModelTree(ids, np.arange(-1, len(ids) - 1, dtype=np.int32), np.full(len(ids), 0.5, np.float32))


def test_text_is_cut_anew_behind_the_last_tokens() -> None:
    source = ForeignModelDraft(model_of(DRAFT), DRAFT, TARGET)
    behind = np.array(TARGET("de a")["input_ids"], np.int32)
    found = source.to_target(behind, b"", chain("d", "▁f", "g"), 9)
    assert TARGET.decode(found.tokens.tolist()) == "d fg"
    assert found.parents.tolist() == [-1, 0, 1, 2]
    np.testing.assert_allclose(found.probs, [0.5, 0.5, 1.0, 0.5], rtol=1e-6)
    assert len(source.to_target(behind, b"", chain("d", "▁f", "g"), 2).tokens) == 2


def test_where_the_target_would_have_joined_the_text_is_cut_alone() -> None:
    source = ForeignModelDraft(model_of(DRAFT), DRAFT, TARGET)
    behind = np.array([TARGET.get_vocab()["a"]], np.int32)
    # "a" and "b" join to one token of the target, which is not what stands there.
    assert source.to_target(behind, b"", chain("b"), 9).tokens.tolist() == [TARGET.get_vocab()["b"]]


def test_a_character_that_the_target_has_begun_is_drafted_to_its_end() -> None:
    """The target's tokens are bytes, the draft model's are characters."""
    texts = Tokenizer(models.BPE({"<eos>": 0, "你": 1, "好": 2, "▁": 3}, []))
    draft = PreTrainedTokenizerFast(tokenizer_object=texts, eos_token="<eos>")
    letters = {chr(256 + number): number for number in range(68)} | {"ä": 68, "½": 69, "å": 70, "¥": 71}
    made = Tokenizer(models.BPE(letters, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    target = PreTrainedTokenizerFast(tokenizer_object=made)
    ids = np.array(target("好你好")["input_ids"], np.int32)
    source = ForeignModelDraft(model_of(draft), draft, target, limits=ExpansionLimits(3, 2, None))
    for begun in (3, 4, 5):
        proposal = source.open(ids[:begun]).propose(200)
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(proposal.tokens.tolist(), proposal.parents.tolist(), strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        assert tuple(ids[begun:].tolist()) in paths, begun


def test_a_draft_model_that_splits_more_goes_deeper() -> None:
    source = ForeignModelDraft(model_of(DRAFT), DRAFT, TARGET, limits=ExpansionLimits(depth=4))
    for text, levels in (("abcabcabcabc", 12), ("hhhhhhhhhhhh", 4), ("hhhhhhabcabc", 6)):
        assert source.depth(np.array(TARGET(text)["input_ids"]), np.array(DRAFT(text)["input_ids"])) == levels


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
