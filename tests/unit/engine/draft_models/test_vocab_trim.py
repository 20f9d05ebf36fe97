"""Draft models and heads over some tokens: the same drafts while those suffice, never another text."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.draft_models.eagle import EagleHead
from retrieval_draft.engine.draft_models.heads import HeadDraft
from retrieval_draft.engine.draft_models.model_draft import ModelDraft, SelfDraft
from retrieval_draft.engine.draft_models.vector_heads import MedusaHead
from retrieval_draft.engine.draft_models.vocab_trim import (
    LEAST,
    MOST,
    MOST_TRIMS,
    VocabTrim,
    VocabTrims,
    columns_for,
    trim_of,
)
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import make

NEW = 60


def linear(rows: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, rows, bias=bias)


def test_tokens_join_and_the_most_counted_stay() -> None:
    trim = VocabTrim([linear(8)], 8, 4)
    assert trim.ids.tolist() == [0, 1]
    trim.add(np.array([[7, 6], [7, 7]]))
    assert trim.ids.tolist() == [0, 1, 6, 7]
    trim.add(np.array([5, 5, 5, 5]))  # one too many: of four columns one stays free
    assert trim.ids.tolist() == [0, 5, 7]
    assert trim.columns_of(np.array([7, 1, 0])).tolist() == [2, -1, 0]
    trim.add(np.array([0, -1, 8, 99]))  # ids that are no tokens
    assert trim.ids.tolist() == [0, 5, 7]


def test_rows_are_copied_before_a_draft_and_not_as_tokens_come() -> None:
    head = linear(8)
    trim = VocabTrim([head], 8, 4)
    nothing = trim.nbytes
    for token in (6, 7, 7):
        trim.add(np.array([token]))
        assert trim.nbytes == nothing
    states = torch.randn(3, 5)
    torch.testing.assert_close(trim.logits(states), head(states)[:, [0, 1, 6, 7]])
    assert trim.nbytes > nothing
    trim.add(np.array([5, 5, 5]))
    assert trim.ids.tolist() == [0, 5, 7]
    trim.add(np.array([3]))
    assert trim.ids.tolist() == [0, 5, 7, 3]  # 6, once wanted, does not come back by itself


@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_those_of_the_tokens(bias: bool) -> None:
    heads = [linear(40, bias), linear(40, bias)]
    trim = VocabTrim(heads, 40, 12)
    draw = np.random.default_rng(0)
    states = torch.randn(3, 5)
    for _ in range(30):
        trim.add(draw.integers(0, 40, 3))
        assert len(trim.ids) <= 12
        assert len(set(trim.ids.tolist())) == len(trim.ids)
        for at, head in enumerate(heads):
            torch.testing.assert_close(trim.logits(states, at), head(states)[:, torch.from_numpy(trim.ids)])


@pytest.mark.parametrize("change", ["written", "data", "moved", "another"])
def test_rows_are_those_of_the_present_weights(change: str) -> None:
    head = linear(8, bias=True)
    trims = VocabTrims([head], 8, 4)
    trim, states = trims.of(None), torch.randn(3, 5)
    trim.add(np.array([6]))
    with torch.no_grad():
        if change == "written":
            head.weight.mul_(2)
        elif change == "data":
            head.bias.data.add_(1)
        elif change == "moved":
            head.double()
            states = states.double()
        else:
            head.weight = nn.Parameter(torch.randn(8, 5))
        assert trims.of(None) is trim
        torch.testing.assert_close(trim.logits(states), head(states)[:, [0, 1, 6]])


def test_what_one_key_writes_chooses_no_other_ones_tokens() -> None:
    trims = VocabTrims([linear(8)], 8, 4)
    trims.of("a").add(np.array([7]))
    assert trims.of("b").ids.tolist() == [0, 1]
    assert trims.of("a").ids.tolist() == [0, 1, 7]
    held = trims.of("a")
    for key in range(MOST_TRIMS):
        trims.of(key)
    assert trims.of("a") is not held
    assert trims.nbytes <= MOST_TRIMS * held.nbytes


def test_small_vocabularies_are_left_whole() -> None:
    assert columns_for(2 * LEAST - 1) == 0
    assert columns_for(2 * LEAST) == LEAST
    assert columns_for(65536) == 8192
    assert columns_for(262144) == MOST
    assert trim_of(make("llama"), 97) is None


def test_a_model_that_needs_all_of_its_logits_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    assert trim_of(model, 97, 20) is not None
    forward = type(model).forward

    def shifted(self: Any, *given: Any, **named: Any) -> Any:
        out = forward(self, *given, **named)
        out.logits = out.logits.log_softmax(-1)
        return out

    monkeypatch.setattr(type(model), "forward", shifted)
    assert trim_of(model, 97, 20) is None


def test_other_threads_have_the_whole_head() -> None:
    model = make("llama")
    trims = trim_of(model, 97, 20)
    assert trims is not None
    trim = trims.of(None)
    sizes = []

    def run() -> None:
        with torch.no_grad():
            sizes.append(model(prompt_ids()).logits.shape[-1])

    with trim.applied():
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    assert sizes == [10, 97, 97]


def test_a_draft_model_loses_next_to_nothing_and_the_text_is_the_same() -> None:
    model = make("gemma3")
    stock = model.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False)
    steps = {}
    for columns in (0, 48):
        draft = ModelDraft(make("gemma3"), 97, columns=columns)
        ours = RetrievalDrafter.for_model(model, draft_model=draft, config=DraftConfig(nodes=12, sources=()))
        assert near_ties(model, ours.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False), stock) == 0
        assert ours.stats.source_failures == 0
        steps[columns] = ours.stats.tokens_per_step
        assert (draft.trims is not None) == bool(columns)
    assert steps[48] > 0.85 * steps[0], steps


def a_head(kind: str, model: Any) -> Any:
    from transformers import LlamaConfig

    torch.manual_seed(1)
    config = model.config
    shape = LlamaConfig(
        hidden_size=config.hidden_size, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1,
        num_key_value_heads=1, vocab_size=97,
    )  # fmt: skip
    return EagleHead(shape, True, False) if kind == "eagle" else MedusaHead(3, 1, config.hidden_size, 97)


@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_drafters_of_one_head_have_columns_of_their_own(kind: str) -> None:
    model = make("llama")

    def drafter_of(head: Any, columns: int) -> RetrievalDrafter:
        source = HeadDraft(head, columns=columns)
        # Which kernel was measured as the fastest would decide between guesses that are nearly equal.
        config = DraftConfig(nodes=8, sources=(), cpu_kernels=False)
        return RetrievalDrafter.for_model(model, draft_model=source, config=config)

    shared = a_head(kind, model)
    sizes = (30, 0, 20)
    together = [drafter_of(shared, columns) for columns in sizes]
    for seed in range(3):
        prompt = prompt_ids(seed=seed)
        for ours in together:
            ours.generate(prompt, max_new_tokens=NEW, do_sample=False)
    for ours, columns in zip(together, sizes, strict=True):
        alone = drafter_of(a_head(kind, model), columns)
        for seed in range(3):
            alone.generate(prompt_ids(seed=seed), max_new_tokens=NEW, do_sample=False)
        assert ours.stats.source_failures == alone.stats.source_failures == 0
        assert (ours.stats.drafted, ours.stats.accepted) == (alone.stats.drafted, alone.stats.accepted)


@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_heads_over_some_tokens_are_exact(kind: str) -> None:
    model = make("llama")
    head = a_head(kind, model)
    source = HeadDraft(head, columns=30)
    ours = RetrievalDrafter.for_model(model, draft_model=source, config=DraftConfig(nodes=8))
    rows = torch.cat([prompt_ids(seed=seed) for seed in range(3)])
    stock = model.generate(rows, max_new_tokens=NEW, do_sample=False)
    assert near_ties(model, ours.generate(rows, max_new_tokens=NEW, do_sample=False), stock) == 0
    assert ours.stats.source_failures == 0
    assert ours.stats.drafted_by_source["model"] > 0
    assert source.trims is not None
    assert 15 <= len(source.trims.of(("", "")).ids) <= 30


@pytest.mark.parametrize("kind", ["model", "self", "medusa"])
def test_a_tenant_drafts_none_of_another_ones_tokens(kind: str) -> None:
    model = make("llama")
    head = MedusaHead(3, 1, model.config.hidden_size, 97)
    source: Any = {
        "model": lambda: ModelDraft(make("llama", seed=3), 97, columns=20),
        "self": lambda: SelfDraft(model, [1]),
        "medusa": lambda: HeadDraft(head, columns=20),
    }[kind]()
    if kind == "self":
        source.trims = trim_of(model, 97, 20)
    drafter = RetrievalDrafter.for_model(model, draft_model=source, config=DraftConfig(nodes=4, sources=()))
    for name in ("one", "two"):
        tenant = drafter.namespace(name, 1 << 20)
        tenant.generate(prompt_ids(), max_new_tokens=4, do_sample=False)
        assert tenant.stats.source_failures == 0
    assert {("one", ""), ("two", "")} <= source.trims._trims.keys()
    for name, tokens in (("a", [90, 91]), ("b", [92])):
        session = source.open(np.array(tokens, np.int32))
        session.keep_apart(name)
        session.observe(np.array([tokens[0]], np.int32))
        session.close()
    assert source.trims.of("a").ids.tolist() == [*range(10), 90, 91]
    assert source.trims.of("b").ids.tolist() == [*range(10), 92]
