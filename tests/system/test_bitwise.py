"""`DraftConfig(exact="bitwise")`: text and cache of half-precision models, bit for bit, drafted and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.target import Target
from retrieval_draft.errors import InvalidInputError, UnsupportedModelError
from tests.support.batches import padded, ragged
from tests.support.bits import ARCHITECTURES, bitwise, generate, half, same_bits
from tests.support.commands import Command
from tests.support.drafters import drafter_with, prompt_ids, reply_of
from tests.support.models import make
from tests.support.sources import OracleSource, PlantedSource

NEW = 48
SAMPLED = {"do_sample": True, "seed": 5, "temperature": 0.9, "top_k": 0}


def check(model: Any, prompt: torch.Tensor, new: int, source: Any, nodes: int, **options: Any) -> None:
    """Drafted text and cache against undrafted ones; drafts were both accepted and refused."""
    text, cache = generate(bitwise(model), prompt, new, **options)
    drafter = bitwise(model, source(reply_of(text, prompt), wrong=0.3), nodes=nodes)
    drafted, other = generate(drafter, prompt, new, **options)
    assert torch.equal(drafted, text)
    assert same_bits(cache, other)
    stats = drafter.stats
    assert 0 < stats.accepted < stats.drafted
    assert stats.steps < new - 1
    assert drafter.target.captures > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_with_siblings_and_wrong_branches(name: str) -> None:
    check(half(name), prompt_ids(40), NEW, OracleSource, 31)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_seeded_with_long_chains(name: str) -> None:
    check(half(name), prompt_ids(7, seed=2), NEW, PlantedSource, 24, **SAMPLED)


@pytest.mark.parametrize(("name", "options"), [("gemma3", {}), ("llama", SAMPLED)])
def test_texts_beyond_a_block_of_far_keys(name: str, options: dict[str, Any]) -> None:
    check(half(name), prompt_ids(210), 130, OracleSource, 20, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    check(half("gemma3", dtype), prompt_ids(40), NEW, OracleSource, 31)


def test_the_default_sources_and_top_k() -> None:
    """Ties at the end of the best logits are frequent in bfloat16."""
    model, prompt = half("llama"), prompt_ids(40)
    config = {"exact": "bitwise", "graphs": "tape"}
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(**config))
    plain = RetrievalDrafter.for_model(model, config=DraftConfig(method="none", **config))
    for options in ({}, {"do_sample": True, "seed": 3, "top_k": 20}, {"repetition_penalty": 1.2}):
        text, cache = generate(plain, prompt, 80, **options)
        drafted, other = generate(drafter, prompt, 80, **options)
        assert torch.equal(drafted, text)
        assert same_bits(cache, other)
    assert drafter.stats.accepted > 20


def test_rows_of_a_batch_have_the_bits_that_they_have_alone() -> None:
    model, prompts = half("gemma3"), ragged((9, 23, 40))
    alone = [generate(bitwise(model), prompt, NEW)[0] for prompt in prompts]
    replies = [reply_of(text, prompt) for text, prompt in zip(alone, prompts, strict=True)]
    ids, mask = padded(prompts)
    drafter = bitwise(model, OracleSource(*replies), nodes=12)
    out = drafter.generate(ids, mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for row, reply in enumerate(replies):
        assert out[row, ids.shape[1] :].tolist() == reply
    assert drafter.stats.accepted > 0


def test_more_rows_than_memories_draw_from_their_own_logits() -> None:
    """Nine rows take turns in eight memories, and passes of one memory write one place."""
    model, prompts = half("llama"), ragged((9,) * 9)
    options = {"max_new_tokens": 6, "do_sample": True, "seed": 5, "top_k": 0}
    alone = [
        bitwise(model).generate(prompt, **options)[0, prompt.shape[1] :].tolist() for prompt in prompts[:1]
    ]
    ids, mask = padded(prompts)
    out = bitwise(model).generate(ids, mask, pad_token_id=0, **options)
    assert out[0, ids.shape[1] :].tolist() == alone[0]


def test_a_continued_cache_has_the_bits_of_a_new_one() -> None:
    """A prompt's keys do not depend on the passes that its parts were in."""
    model, prompt = half("mistral"), prompt_ids(40)
    drafter = bitwise(model, OracleSource(()), nodes=12)
    first, cache = generate(drafter, prompt, 20)
    turn = torch.cat([first, prompt_ids(21, seed=3)], 1)
    text, fresh = generate(bitwise(model), turn, NEW)
    drafted, other = generate(drafter, turn, NEW, cache=cache)
    assert torch.equal(drafted, text)
    assert same_bits(fresh, other)


def test_without_it_bfloat16_text_depends_on_drafts() -> None:
    """The same comparison fails without the option, so that it could fail with it."""
    model, prompt = half("llama"), prompt_ids(40)
    eager: dict[str, Any] = {"cpu_kernels": False, "target": Target(model, "off")}
    text, cache = generate(drafter_with(model, **eager), prompt, NEW)
    drafter = drafter_with(model, OracleSource(reply_of(text, prompt), wrong=0.3), nodes=31, **eager)
    drafted, other = generate(drafter, prompt, NEW)
    assert not (torch.equal(drafted, text) and same_bits(cache, other))


class _Neighbours(nn.Module):
    """A layer that adds a trace of the whole pass to each of its tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(states)
        return out + out.mean(1, keepdim=True) * 0.01


class _Slots(_Neighbours):
    """A layer whose result depends on a token's index in the pass."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(states)
        return out * (1 + 0.01 * torch.arange(out.shape[1], dtype=out.dtype) / out.shape[1])[None, :, None]


class _Waits(_Neighbours):
    """A layer that lets the host choose a shape."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(states)
        return out.index_fill(1, states[0, :, 0].isnan().nonzero()[:, 0], 0.0)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_Neighbours, "beside others|keys or values"),
        (_Slots, "beside others|keys or values"),
        (_Waits, "the host chooses"),
    ],
)
def test_models_whose_rows_depend_on_others_are_refused(kind: type[_Neighbours], reason: str) -> None:
    model = half("llama")
    layer = model.model.layers[1].mlp
    layer.down_proj = kind(layer.down_proj)
    with pytest.raises(UnsupportedModelError, match=reason):
        RetrievalDrafter.for_model(model, config=DraftConfig(exact="bitwise"))


def test_a_model_that_changes_is_tested_again() -> None:
    model, prompt = half("llama"), prompt_ids(20)
    drafter = bitwise(model)
    generate(drafter, prompt, 4)
    layer = model.model.layers[1].mlp
    layer.down_proj = _Slots(layer.down_proj)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="not exact in bits"):
            generate(drafter, prompt, 4)
    layer.down_proj = layer.down_proj.inner
    assert torch.equal(generate(drafter, prompt, 9)[0], generate(bitwise(model), prompt, 9)[0])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("llama-longrope", "rotary"), ("doge", "attends")],
)
def test_models_that_have_no_such_passes_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        RetrievalDrafter.for_model(make(name), config=DraftConfig(exact="bitwise"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"exact": "yes"}, "exact is 'yes'"), ({"exact": "bitwise", "nodes": 32}, "at most 31")],
)
def test_options_that_cannot_be(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        DraftConfig(**options)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("generate", "hello", "--model", "m", "--exact", "yes"), "exact is 'yes'"),
        (("serve", "--model", "m", "--engine", "vllm", "--exact", "bitwise"), "has no --exact"),
    ],
)
def test_the_command_line(command: Command, words: tuple[str, ...], reason: str) -> None:
    code, _, err = command(*words)
    assert code != 0
    assert reason in err
