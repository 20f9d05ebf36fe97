"""Gemma 4's assistant: what transformers' own class guesses from the target's keys, and exact text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.draft_models.assistant import AssistantHead
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits, Growth
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError, ModelFileError
from tests.support.drafters import near_ties, prompt_ids
from tests.support.heads import HAS_ASSISTANTS, assistant_model, write_head
from tests.support.models import GEMMA4, WINDOW, make

pytestmark = pytest.mark.skipif(not HAS_ASSISTANTS, reason="this transformers has no assistant of Gemma 4")

NEW = 24
CLUSTERS = {"use_ordered_embeddings": True, "num_centroids": 8, "centroid_intermediate_top_k": 3}


def ordered(**options: Any) -> Any:
    """An assistant that chooses clusters of tokens: 96 tokens in 8 of 12."""
    torch.manual_seed(4)
    model = assistant_model(**CLUSTERS, **options)
    text = model.config.get_text_config()
    text.vocab_size = 96
    model = type(model)(model.config).eval()
    model.masked_embedding.token_ordering.copy_(torch.randperm(96))
    return model


@torch.no_grad()
@pytest.mark.parametrize("target", GEMMA4)
@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("length", [9, WINDOW + 14])
def test_each_node_is_guessed_as_by_transformers(target: str, clusters: bool, length: int) -> None:
    model, own = make(target), ordered() if clusters else assistant_model()
    head = AssistantHead(own, ExpansionLimits(top_k=3, depth=3, entropy_stop=None))
    head.bind(model)
    text = prompt_ids(length + 1)
    out = model(text[:, :-1], output_hidden_states=True, return_shared_kv_states=True)
    seen = {
        kind: tuple(each[:, :, -(WINDOW - 1) if kind[0] == "s" else 0 :] for each in kept)
        for kind, kept in out.shared_kv_states.items()
    }
    cache = Target(model).cache(length)
    for _ in Target(model).prefill(cache, text[0, :-1], 1):
        pass
    state, rows = head.state(), out.hidden_states[-1][0, -1:]
    state.cache = cache
    growth = Growth(head.limits, 40)
    growth.begin(int(text[0, -1]), head.read([state], [text[0, -1:]], [rows], [length - 1])[0])
    logits = {}
    while growth.frontier:
        nodes = list(growth.frontier)
        added = head.expand([state], [growth])[0]
        logits |= dict(zip(nodes, added, strict=True))
        growth.add(added)
    assert len(logits) >= 6
    for node, found in logits.items():
        path = []
        while node >= 0:
            path.insert(0, growth.tokens[node])
            node = growth.parents[node]
        vector = rows[None]
        for token in path:
            embedded = model.get_input_embeddings()(torch.tensor([[token]]))
            made = own(
                inputs_embeds=torch.cat((embedded, vector), -1),
                position_ids=torch.tensor([[length]]),
                shared_kv_states=seen,
            )
            vector = made.last_hidden_state
        wanted = made.logits[0, 0]
        guessed = found.isfinite()
        assert bool(guessed.all()) is not clusters
        torch.testing.assert_close(found[guessed], wanted[guessed], atol=1e-4, rtol=1e-3)
        assert clusters is False or wanted[~guessed].unique().numel() == 1
    head.drop(state)
    assert cache.get_seq_length() == length


def drafter_of(model: Any, draft_model: Any, **options: Any) -> RetrievalDrafter:
    config = DraftConfig(**{"nodes": 8, "sources": (), "cpu_kernels": False, **options})
    return RetrievalDrafter.for_model(model, draft_model=draft_model, config=config)


def test_a_trained_assistant_drafts_what_the_target_writes() -> None:
    model, own = make("gemma4"), assistant_model()
    prompt = prompt_ids()
    stock = model.generate(prompt, max_new_tokens=60, do_sample=False)
    target = Target(model)
    cache = target.cache(stock.shape[1])
    with torch.no_grad():
        for _ in target.prefill(cache, stock[0], 1):
            pass
        states = model(stock, output_hidden_states=True).hidden_states[-1][0]
    head = AssistantHead(own)
    head.bind(model)
    optimizer = torch.optim.Adam(own.parameters(), 0.02)
    for _ in range(20):
        loss = torch.zeros(())
        for at in range(prompt.shape[1], stock.shape[1] - 2, 9):
            state = head.state()
            state.cache = _first(cache, at + 1)
            (logits,) = head.read([state], [stock[0, at + 1 : at + 2]], [states[at : at + 1]], [at])
            loss = loss + torch.nn.functional.cross_entropy(logits, stock[0, at + 2 : at + 3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drafter = drafter_of(model, head)
    assert near_ties(model, drafter.generate(prompt, max_new_tokens=60, do_sample=False), stock) == 0
    assert drafter.stats.tokens_per_step > 1.5


def _first(cache: Any, length: int) -> Any:
    """A cache of the first tokens."""
    part = cache.clone()
    assert part.keep(length) or length <= WINDOW
    return part


@pytest.mark.parametrize("way", ["trees", "captured", "samples", "bitwise"])
def test_text_is_that_of_generate(way: str, tmp_path: Path) -> None:
    model = make("gemma4-shared")
    options = {"captured": {"graphs": "tape"}, "bitwise": {"exact": "bitwise"}}.get(way, {})
    drafter = drafter_of(model, write_head(tmp_path, "gemma4_assistant"), **options)
    prompt = prompt_ids()
    if way == "samples":
        plain = RetrievalDrafter.for_model(model, config=DraftConfig("none", cpu_kernels=False))
        sampled = {"max_new_tokens": NEW, "do_sample": True, "seed": 3, "num_return_sequences": 3}
        assert torch.equal(drafter.generate(prompt, **sampled), plain.generate(prompt, **sampled))
    else:
        stock = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
        assert near_ties(model, drafter.generate(prompt, max_new_tokens=NEW, do_sample=False), stock) == 0
    assert drafter.stats.source_failures == 0
    assert drafter.stats.drafted > drafter.stats.steps


def test_a_target_without_its_keys_is_refused(tmp_path: Path) -> None:
    name = write_head(tmp_path, "gemma4_assistant")
    with pytest.raises(InvalidInputError, match="the model has no sliding_attention"):
        drafter_of(make("llama"), name)
    with pytest.raises(InvalidInputError, match=r"2 heads of 16 columns; layer 3 of the model has 16"):
        drafter_of(make("gemma4", global_head_dim=8), name)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"backbone_hidden_size": 24}, "the target's states have 32 columns"),
        ({"text_config": {"vocab_size": 90}}, "expected is one of shape [90, 24]"),
        ({"text_config": None}, "unusable config.json"),
        ({**CLUSTERS, "num_centroids": 10**9}, "num_centroids"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    change: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    name = write_head(tmp_path, "gemma4_assistant")
    config = json.loads((tmp_path / "config.json").read_text())
    text = change.get("text_config", {})
    merged = {**config, **change, "text_config": None if text is None else {**config["text_config"], **text}}
    (tmp_path / "config.json").write_text(json.dumps(merged))
    with pytest.raises(ModelFileError) as raised:
        drafter_of(make("gemma4"), name)
    assert name in str(raised.value)
    assert expected in str(raised.value)
