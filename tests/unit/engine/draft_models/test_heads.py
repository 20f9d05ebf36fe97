"""Trained heads on the target's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.drafting.hierarchy import SourceHierarchy
from retrieval_draft.engine.draft_models.head_files import load_head
from retrieval_draft.engine.draft_models.heads import HeadDraft
from retrieval_draft.engine.draft_models.vector_heads import MedusaHead
from retrieval_draft.engine.hidden_states import LAST, HiddenStates
from retrieval_draft.engine.target import Target
from retrieval_draft.index.draft_stores import DraftStores
from retrieval_draft.methods.method import MethodContext
from retrieval_draft.methods.registry import get_method
from tests.support.drafters import near_ties, prompt_ids
from tests.support.heads import write_head
from tests.support.models import make

NEW = 80


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """Input of layer 1 and of the output head at each token: (n, 64)."""
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    return torch.cat((states[1], states[-1]), -1)[0]


def train(model: Any, text: Tensor) -> MedusaHead:
    torch.manual_seed(0)
    head = MedusaHead(2, 1, 32, 97)
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    states = hidden_states(model, text)[:-3, 32:]
    for _ in range(150):
        loss = torch.zeros(())
        for level in range(2):
            logits = head.step(level, text[0, 1:-2], states)[1]
            loss = loss + torch.nn.functional.cross_entropy(
                logits, text[0, 2 + level : text.shape[1] - 1 + level]
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


class Watcher(MedusaHead):
    """Notes every row that it reads."""

    layers = (1, LAST)
    reads_all = True

    def __init__(self) -> None:
        super().__init__(2, 1, 64, 97)
        self.rows: list[tuple[int, list[int], Tensor]] = []
        self.together = 0

    def read(
        self, states: Sequence[Any], tokens: Sequence[Tensor], hidden: Sequence[Tensor], begins: Sequence[int]
    ) -> list[Tensor]:
        self.together = max(self.together, len(states))
        for state, ids, rows, begin in zip(states, tokens, hidden, begins, strict=True):
            state.length = begin + len(rows)
            self.rows.append((begin, ids.tolist(), rows.clone()))
        return super().read(states, tokens, hidden, begins)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_trained_head_drafts_and_leaves_the_text_as_it_is(name: str) -> None:
    model = make(name)
    prompt = prompt_ids()
    stock = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    config = DraftConfig(nodes=4, sources=())
    drafter = RetrievalDrafter.for_model(model, draft_model=HeadDraft(train(model, stock)), config=config)
    assert near_ties(model, drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), stock) == 0
    assert drafter.stats.source_failures == 0
    assert drafter.stats.tokens_per_step > 1.8


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_head_reads_the_states_of_every_token_but_the_last(chunk: int | None) -> None:
    model, prompt, head = make("llama"), prompt_ids(), Watcher()
    config = DraftConfig(nodes=8, cpu_kernels=False)
    drafter = RetrievalDrafter.for_model(model, draft_model=HeadDraft(head), config=config)
    out = drafter.generate(prompt, max_new_tokens=30, do_sample=False, prefill_chunk_size=chunk)
    text, states, at = out[0].tolist(), hidden_states(model, out), 0
    for begin, tokens, rows in head.rows:
        assert begin == at
        assert tokens == text[begin + 1 : begin + 1 + len(rows)]
        torch.testing.assert_close(rows, states[begin : begin + len(rows)], atol=1e-3, rtol=1e-3)
        at += len(rows)
    assert at >= out.shape[1] - 1 - 8
    assert drafter.stats.steps == len(head.rows)


def test_rows_of_a_batch_are_drafted_for_together() -> None:
    model, head = make("llama"), Watcher()
    prompts = torch.cat([prompt_ids(seed=seed) for seed in range(4)])
    config = DraftConfig(nodes=8, sources=(), cpu_kernels=False)
    drafter = RetrievalDrafter.for_model(model, draft_model=HeadDraft(head), config=config)
    out = drafter.generate(prompts, max_new_tokens=20, do_sample=False)
    assert torch.equal(out, model.generate(prompts, max_new_tokens=20, do_sample=False))
    assert head.together == 4
    states = [hidden_states(model, row[None]) for row in out]
    for begin, tokens, rows in head.rows:
        (row,) = {
            at for at, text in enumerate(out.tolist()) if text[begin + 1 : begin + 1 + len(tokens)] == tokens
            and torch.allclose(rows, states[at][begin : begin + len(rows)], atol=1e-3)
        }  # fmt: skip
        assert row in range(4)


class Alone(Watcher):
    """Fails where it is given two texts at once."""

    def read(
        self, states: Sequence[Any], tokens: Sequence[Tensor], hidden: Sequence[Tensor], begins: Sequence[int]
    ) -> list[Tensor]:
        if len(states) > 1:
            raise RuntimeError("two")
        return super().read(states, tokens, hidden, begins)


def test_a_read_that_fails_for_rows_together_costs_none_its_drafts() -> None:
    model, head = make("llama"), Alone()
    prompts = torch.cat([prompt_ids(seed=seed) for seed in range(3)])
    config = DraftConfig(nodes=8, sources=(), cpu_kernels=False)
    drafter = RetrievalDrafter.for_model(model, draft_model=HeadDraft(head), config=config)
    out = drafter.generate(prompts, max_new_tokens=12, do_sample=False)
    assert torch.equal(out, model.generate(prompts, max_new_tokens=12, do_sample=False))
    assert drafter.stats.source_failures == 0
    for text in out.tolist():
        rows = [(begin, ids) for begin, ids, _ in head.rows if text[begin + 1 : begin + 1 + len(ids)] == ids]
        assert sum(len(ids) for _, ids in rows) >= len(text) - 1 - 8


def test_a_head_that_slept_reads_what_waits_and_proposes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_draft.engine.draft_models.heads.WAITING", 4)
    source = HeadDraft(head := Watcher())
    source.states = HiddenStates(make("llama"))
    source.states.read(head.layers)
    session = source.open(np.array([1, 2, 3, 4], np.int32))
    session.learn_hidden(torch.randn(4, 64), 0)
    session.observe(np.array([5, 6, 7], np.int32))
    session.learn_hidden(torch.randn(2, 64), 4)
    assert [(begin, ids) for begin, ids, _ in head.rows] == [(0, [2, 3, 4, 5, 6, 7])]
    assert len(session.propose(4).tokens)


def test_a_prompt_is_read_once_for_its_samples() -> None:
    model, prompt, head = make("llama"), prompt_ids(), Watcher()
    config = DraftConfig(nodes=8, sources=(), cpu_kernels=False)
    drafter = RetrievalDrafter.for_model(model, draft_model=HeadDraft(head), config=config)
    drafter.generate(prompt, max_new_tokens=6, do_sample=True, seed=1, num_return_sequences=3)
    assert drafter.stats.source_failures == 0
    assert sum(len(rows) for begin, _, rows in head.rows if begin == 0) <= 2 * prompt.shape[1]


@pytest.mark.parametrize("method", ["calibrated", "rasd", "sam_decoding"])
def test_the_key_of_states_reaches_a_head_in_any_method(method: str) -> None:
    source = HeadDraft(Watcher())
    config = DraftConfig(method=method)
    sources = get_method(method).sources(MethodContext(config, DraftStores(97), (source,)))
    opened = SourceHierarchy(sources).open(np.array([1, 2, 3], np.int32))
    opened.share_hidden(("tenant", "salt"))
    assert [each.key for each in source._live] == [("tenant", "salt")]
    assert opened.wants_hidden


@torch.no_grad()
def test_states_of_other_keys_are_not_continued(tmp_path: Path) -> None:
    model = make("llama")
    source = HeadDraft(load_head(write_head(tmp_path, "eagle"), model))
    source.bind(Target(model))
    text = np.array([1, 2, 3, 4, 5], np.int32)
    for key in (None, "a"):
        session = source.open(text)
        session.share_hidden(key)
        session.learn_hidden(torch.randn(4, 32), 0)
        source.read([session])
        session.close()
    for key, found in ((None, True), ("a", True), ("b", False)):
        session = source.open(text)
        session.share_hidden(key)
        assert (source.find_state(session, 3) is not None) == found
    assert source.nbytes > 0


def test_no_hook_stays_behind() -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(model, draft_model=HeadDraft(Watcher()), config=DraftConfig(nodes=4))
    drafter.generate(prompt_ids(), max_new_tokens=5, do_sample=False)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
