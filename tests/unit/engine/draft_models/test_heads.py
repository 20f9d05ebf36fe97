"""Trained heads on the target's hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.draft_models.expansion import ModelTree
from retrieval_draft.engine.draft_models.heads import HeadDraft
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import make

NEW = 80


class SmallMedusa:
    """For each of the two tokens after the root, one linear layer on the hidden state, and a chain of both.

    The first sees the root's embedding too, as EAGLE does: what follows depends on what was chosen.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2 * width, vocabulary) for _ in range(2))

    def logits(self, hidden: Tensor, tokens: Tensor) -> list[Tensor]:
        states = torch.cat((hidden, self.embed(tokens)), -1)
        return [layer(states) for layer in self.layers]

    def propose(self, hidden: Tensor, token: int, budget: int) -> ModelTree:
        guesses = [row[0].softmax(-1).max(-1) for row in self.logits(hidden[None], torch.tensor([token]))]
        tokens = np.array([int(best.indices) for best in guesses], np.int32)[:budget]
        probs = np.array([float(best.values) for best in guesses], np.float32)[:budget]
        return ModelTree(tokens, np.arange(len(tokens), dtype=np.int32) - 1, probs)


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    kept: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    model(ids)
    handle.remove()
    return kept[0][0]


def train(model: Any, texts: list[Tensor]) -> SmallMedusa:
    head = SmallMedusa(32, 97)
    parameters = [*head.embed.parameters(), *head.layers.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.02)
    with torch.no_grad():
        states = [(hidden_states(model, text), text[0]) for text in texts]
    for _ in range(150):
        loss = torch.zeros(())
        for hidden, text in states:
            for ahead, logits in enumerate(head.logits(hidden[:-3], text[1:-2])):
                loss = loss + torch.nn.functional.cross_entropy(
                    logits, text[2 + ahead : len(text) - 1 + ahead]
                )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_trained_head_drafts_and_leaves_the_text_as_it_is(name: str) -> None:
    model = make(name)
    prompt = prompt_ids()
    stock = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    head = train(model, [stock])
    config = DraftConfig(nodes=4, sources=())
    drafter = RetrievalDrafter.for_model(model, draft_model=HeadDraft(head), config=config)
    assert near_ties(model, drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), stock) == 0
    assert drafter.stats.source_failures == 0
    assert drafter.stats.tokens_per_step > 1.8


def test_the_hidden_state_is_the_one_that_chose_the_root() -> None:
    model = make("llama")
    prompt = prompt_ids()
    seen: list[tuple[Tensor, int]] = []

    class Watcher(SmallMedusa):
        def propose(self, hidden: Tensor, token: int, budget: int) -> ModelTree:
            seen.append((hidden.clone(), token))
            return super().propose(hidden, token, budget)

    drafter = RetrievalDrafter.for_model(
        model, draft_model=HeadDraft(Watcher(32, 97)), config=DraftConfig(nodes=8, cpu_kernels=False)
    )
    out = drafter.generate(prompt, max_new_tokens=30, do_sample=False)
    with torch.no_grad():
        states = hidden_states(model, out)
        head = model.get_output_embeddings()
    assert len(seen) == drafter.stats.steps
    at = prompt.shape[1] - 1
    for hidden, token in seen:
        assert int(head(hidden).argmax()) == token
        while not torch.allclose(states[at], hidden, atol=1e-3):
            at += 1
        assert int(out[0, at + 1]) == token


def test_no_hook_stays_behind() -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(
        model, draft_model=HeadDraft(SmallMedusa(32, 97)), config=DraftConfig(nodes=4)
    )
    drafter.generate(prompt_ids(), max_new_tokens=5, do_sample=False)
    assert not model.get_output_embeddings()._forward_pre_hooks
