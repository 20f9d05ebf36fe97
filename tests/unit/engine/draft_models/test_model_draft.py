"""Draft models in the same tree: exact with every kind, and worth it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.draft_models.expansion import ExpansionLimits
from retrieval_draft.engine.draft_models.model_draft import ModelDraft, ParallelDraft, SelfDraft
from retrieval_draft.errors import InvalidInputError, ModelFileError, TokenizerMismatchError
from tests.support.drafters import near_ties, prompt_ids
from tests.support.models import make
from tests.support.tiny import letter_tokenizer

NEW = 60
FREE = ExpansionLimits(top_k=4, depth=6, entropy_stop=None)


def drafter(model: Any, draft: Any, nodes: int | None = 12, **options: Any) -> RetrievalDrafter:
    config = DraftConfig(nodes=nodes, **options)
    return RetrievalDrafter.for_model(model, draft_model=draft, config=config)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "gpt-neox", "mixtral"])
@pytest.mark.parametrize("kind", ["itself", "smaller", "self", "int8", "both"])
def test_greedy_equals_generate(name: str, kind: str) -> None:
    if kind == "int8":
        pytest.importorskip("optimum.quanto")
    model = make(name)
    drafts: Any = {
        "itself": lambda: make(name),
        "smaller": lambda: make("llama", seed=7, num_hidden_layers=1),
        "self": lambda: SelfDraft(model, skip=[1]),
        "int8": lambda: "int8",
        "both": lambda: [make(name, seed=3), SelfDraft(model, skip=[2])],
    }[kind]()
    prompt = prompt_ids()
    stock = model.generate(prompt, max_new_tokens=NEW, do_sample=False)
    ours = drafter(model, drafts)
    for _ in range(2):
        assert near_ties(model, ours.generate(prompt, max_new_tokens=NEW, do_sample=False), stock) == 0
    assert ours.stats.source_failures == 0
    assert ours.stats.drafted_by_source["model"] > 0


def test_a_model_that_is_the_target_is_accepted_to_the_end() -> None:
    model = make("gemma3")
    ours = drafter(model, ModelDraft(make("gemma3"), 97, FREE), nodes=60, sources=())
    ours.generate(prompt_ids(), max_new_tokens=NEW, do_sample=False)
    assert ours.stats.tokens_per_step > 5  # a beam of 4 loses the greedy path now and then


def test_a_seeded_sample_equals_the_same_seed_without_drafts() -> None:
    model = make("llama")
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.8, "seed": 4}
    plain = RetrievalDrafter.for_model(model, method="none").generate(prompt_ids(), **options)
    assert torch.equal(drafter(model, make("llama")).generate(prompt_ids(), **options), plain)


@pytest.mark.parametrize(("rounds", "least"), [(1, 0.97), (3, 1.05)])
def test_the_fused_tree_accepts_what_the_better_of_both_accepts(rounds: int, least: float) -> None:
    """A model that half knows the target, beside lookups that know nothing, or half of the requests too."""
    model = make("llama")
    near = make("llama")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in near.parameters():
            weight += 0.01 * torch.randn_like(weight)
    steps = {}
    for kind, sources, draft in (
        ("lookup", ("automaton", "adjacency", "history"), None),
        ("model", (), ModelDraft(near, 97, FREE)),
        ("both", ("automaton", "adjacency", "history"), ModelDraft(near, 97, FREE)),
    ):
        ours = RetrievalDrafter.for_model(
            model, draft_model=draft, config=DraftConfig(nodes=8, sources=sources)
        )
        for turn in range(rounds):
            for seed in range(4 + 2 * turn):
                ours.generate(prompt_ids(seed=seed), max_new_tokens=100, do_sample=False)
                ours.flush()
        steps[kind] = ours.stats.tokens_per_step
    assert steps["both"] >= max(steps["lookup"], steps["model"]) * least, steps
    assert steps["model"] > 1.2


def test_by_cost_a_useless_model_is_left_out_again() -> None:
    model = make("llama")
    ours = drafter(model, make("gemma3", seed=9), nodes=None)
    prompt = prompt_ids()
    stock = model.generate(prompt, max_new_tokens=200, do_sample=False)
    assert near_ties(model, ours.generate(prompt, max_new_tokens=200, do_sample=False), stock) == 0


def test_layers_are_left_out_only_while_drafting_and_in_one_thread() -> None:
    model = make("llama")
    draft = SelfDraft(model, skip=[1])
    ids = prompt_ids()
    whole = model(ids).logits
    seen: list[torch.Tensor] = []
    with torch.no_grad(), draft.applied():
        skipped = model(ids).logits
        other = threading.Thread(target=lambda: seen.append(model(ids).logits))
        other.start()
        other.join()
    assert not torch.allclose(skipped, whole)
    torch.testing.assert_close(seen[0], whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(ids).logits, whole)


def test_the_default_choice_of_layers() -> None:
    assert SelfDraft(make("llama", num_hidden_layers=12)).skip == (3, 5, 7)
    with pytest.raises(InvalidInputError, match="layers 0\\.\\.2"):
        SelfDraft(make("llama"), skip=[0])


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="this transformers has no Gemma 4")
def test_layers_whose_keys_others_use_are_not_skipped() -> None:
    model = make("gemma4-shared")
    text = model.config.get_text_config(decoder=True)
    own = text.num_hidden_layers - text.num_kv_shared_layers
    lender = max(at for at in range(own) if text.layer_types[at] == text.layer_types[-1])
    ours = drafter(model, "self", sources=())
    stock = model.generate(prompt_ids(), max_new_tokens=100, do_sample=False)  # through the search
    assert near_ties(model, ours.generate(prompt_ids(), max_new_tokens=100, do_sample=False), stock) == 0
    assert ours.stats.source_failures == 0
    assert ours.stats.drafted_by_source["model"] > 0
    with pytest.raises(InvalidInputError, match=f"use the keys of {lender}"):
        SelfDraft(model, skip=[lender])


def test_tokens_that_a_draft_model_does_not_know() -> None:
    source = ModelDraft(make("llama", vocab_size=40), 97)
    with pytest.raises(TokenizerMismatchError, match="unknown to the draft model"):
        source.open(np.array([50], np.int32))
    larger = ModelDraft(make("llama", vocab_size=200), 97, FREE)
    session = larger.open(np.array([1, 2, 3], np.int32))
    assert session.propose(30).tokens.max() < 97


MASK = 96


def save_parallel(folder: Path, mask: int = MASK) -> str:
    """A draft model with masks as PARD's are published: a Llama whose config.json has `pard_token`."""
    model = make("llama", seed=7, num_hidden_layers=1)
    model.config.pard_token = mask
    model.save_pretrained(folder)
    letter_tokenizer(97).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def test_a_parallel_model_guesses_at_masks_in_one_pass() -> None:
    model = make("llama")
    text = prompt_ids(20)[0].numpy().astype(np.int32)
    draft = ParallelDraft(model, 97, MASK)
    opened, passes = draft.session(text, ExpansionLimits(top_k=2, depth=3, entropy_stop=None), 1), []
    model.register_forward_hook(lambda *_: passes.append(1))
    for tokens in ([], [5, 6], [7]):
        opened.observe(np.array(tokens, np.int32))
        text = np.concatenate((text, np.array(tokens, np.int32)))
        passes.clear()
        proposal = opened.propose(14)
        assert len(passes) == 1
        masked = torch.from_numpy(np.concatenate((text, [MASK, MASK]))).long()[None]
        best = model(masked).logits[0, -3:].softmax(-1).topk(2)
        depths: list[int] = []
        for parent in proposal.parents.tolist():
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        assert [depths.count(depth) for depth in range(3)] == [2, 4, 4], "a level expands two nodes"
        for token, prob, depth in zip(proposal.tokens, proposal.probs, depths, strict=True):
            rank = best.indices[depth].tolist().index(int(token))
            assert float(prob) == pytest.approx(float(best.values[depth, rank]), rel=1e-3, abs=2e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_text_with_a_parallel_model_is_that_without(name: str, tmp_path: Path) -> None:
    model = make(name)
    ours = drafter(model, save_parallel(tmp_path), sources=(), prefix_cache_bytes=1 << 22, cpu_kernels=False)
    assert isinstance(ours.context.models[0], ParallelDraft)
    prompts = torch.cat([prompt_ids(seed=seed) for seed in range(4)])
    stock = model.generate(prompts, max_new_tokens=20, do_sample=False)
    for _ in range(2):  # the second time from the prefix cache
        out = ours.generate(prompts, max_new_tokens=20, do_sample=False)
        assert sum(near_ties(model, out[row : row + 1], stock[row : row + 1]) for row in range(4)) == 0
    plain = RetrievalDrafter.for_model(model, config=DraftConfig("none", cpu_kernels=False))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "top_k": 0}
    for seed in range(24):
        texts = [each.generate(prompts[:1], seed=seed, **options) for each in (ours, plain)]
        assert torch.equal(*texts)
    assert ours.stats.source_failures == 0
    assert ours.stats.drafted > ours.stats.steps
    assert ours.stats.cached_tokens > 0


def test_a_corrupt_parallel_model_is_refused(tmp_path: Path) -> None:
    name = save_parallel(tmp_path, mask=500)
    with pytest.raises(InvalidInputError, match="pard_token is 500; it has 97 tokens"):
        drafter(make("llama"), name)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError) as raised:
        drafter(make("llama"), name)
    assert name in str(raised.value)
