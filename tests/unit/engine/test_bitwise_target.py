"""Passes of one shape: prompts in any parts, more caches than have memory, and captures that fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.drafting.tree import DraftTree
from retrieval_draft.engine import bitwise_target
from retrieval_draft.engine.bitwise_target import BitwiseTarget
from retrieval_draft.engine.graph.arena import slot_bytes
from retrieval_draft.engine.graph.captured import TapeGraph
from tests.support.bits import bitwise, generate, half, same_bits
from tests.support.drafters import prompt_ids


def passed(target: BitwiseTarget, ids: Tensor, chunk: int | None = None, rows: int = 1) -> tuple[Any, Tensor]:
    """A cache of a text, and the logits of its last tokens."""
    cache = target.cache(len(ids))
    with torch.no_grad():
        return cache, torch.cat(list(target.prefill(cache, ids, rows, chunk)))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_prompts_in_any_parts(name: str) -> None:
    target, ids = BitwiseTarget(half(name), "tape"), prompt_ids(75)[0]
    cache, logits = passed(target, ids, rows=40)
    for chunk, rows in ((1, 40), (7, 40), (33, 12), (64, 1)):
        other, some = passed(target, ids, chunk, rows)
        assert torch.equal(some, logits[-rows:])
        assert same_bits(cache, other)


def test_more_caches_than_have_memory_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitwise_target, "_MOST_ROOMS", 2)
    target = BitwiseTarget(half("gemma3"), "tape")
    texts = [prompt_ids(60, seed=seed)[0] for seed in range(4)]
    expected = [passed(target, text)[0] for text in texts]
    caches = [passed(target, text[:50])[0] for text in texts]
    for begin in range(50, 60, 5):
        for cache, text in zip(caches, texts, strict=True):
            with torch.no_grad():
                list(target.prefill(cache, text[begin : begin + 5], 1))
    assert all(map(same_bits, caches, expected))
    assert len(target._rooms) <= 2


def test_texts_that_outgrow_their_memory() -> None:
    target, ids = BitwiseTarget(half("llama"), "tape"), prompt_ids(400)[0]
    cache, _ = passed(target, ids[:200])
    with torch.no_grad():
        for part in ids[200:].split(50):
            list(target.prefill(cache, part, 1))
    assert same_bits(cache, passed(target, ids)[0])
    assert len(target._rooms) == 2


def test_memory_under_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it unused memory goes first, then caches take turns; the bits of a text stay the same."""
    monkeypatch.setattr(bitwise_target, "_WEIGHTS_PER_ARENA", 1)
    target = BitwiseTarget(half("gemma3", max_position_embeddings=4096), "tape")
    texts = [prompt_ids(300, seed=seed)[0] for seed in range(3)]
    expected = [passed(target, text)[0] for text in texts]
    caches = [passed(target, text[:200])[0] for text in texts]
    assert all(map(target.holds, caches))
    most = 2 * 512 * slot_bytes(caches[0])
    assert target.nbytes > most
    memory = target.pass_memory
    memory.limit(most)
    assert target.nbytes <= most
    for begin in range(200, 300, 25):
        for cache, text in zip(caches, texts, strict=True):
            with torch.no_grad():
                list(target.prefill(cache, text[begin : begin + 25], 1))
            assert target.holds(cache)
            assert memory.nbytes <= most
    assert all(map(same_bits, caches, expected))
    memory.limit(0)
    assert (memory.nbytes, target.holds(caches[0])) == (0, False)
    again, _ = passed(target, texts[0])
    assert target.holds(again), "one is always passed"
    assert same_bits(again, expected[0])
    memory.limit(None)
    assert all(target.holds(passed(target, text)[0]) for text in texts)


def test_passes_that_cannot_be_captured_are_made_anew_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = half("llama"), prompt_ids(40)[0]
    cache, logits = passed(BitwiseTarget(model, "tape"), ids)

    class Failing(TapeGraph):
        def capture(self, calls: Any) -> Any:
            raise RuntimeError("no driver")

    target = BitwiseTarget(model, "tape")
    monkeypatch.setattr(target, "_recorder", Failing)
    other, same = passed(target, ids)
    assert torch.equal(logits, same)
    assert same_bits(cache, other)
    assert "no driver" in caplog.text
    assert target.captures == 0


def test_trees_wider_than_a_pass_are_refused() -> None:
    target = BitwiseTarget(half("llama"), "tape")
    cache, _ = passed(target, prompt_ids(5)[0])
    size = target.width + 1
    ones = np.ones(size, np.float32)
    parents, depths = np.array([-1] + [0] * (size - 1), np.int32), np.array([0] + [1] * (size - 1), np.int32)
    tree = DraftTree(np.arange(size, dtype=np.int32), parents, depths, ones, ones, np.zeros(size, np.int64))
    with pytest.raises(ValueError, match="more than 32 nodes"):
        target.verify_tree(cache, tree, 5)


def test_kept_prefixes_have_the_bits_of_new_ones() -> None:
    model, prompt = half("gemma3"), prompt_ids(90)
    config = DraftConfig(exact="bitwise", graphs="tape", prefix_cache_bytes=1 << 22)
    drafter = RetrievalDrafter.for_model(model, config=config)
    drafter.generate(prompt, max_new_tokens=20, do_sample=False)
    turn = torch.cat([prompt[:, :80], prompt_ids(9, seed=4)], 1)
    drafted, cache = generate(drafter, turn, 30)
    assert drafter.last_stats is not None
    assert drafter.last_stats.cached_tokens > 0
    text, fresh = generate(bitwise(model), turn, 30)
    assert torch.equal(drafted, text)
    assert same_bits(cache, fresh)


def test_layers_that_are_read_later_get_passes_of_their_own() -> None:
    """A trained head names its layers after the model was tested."""
    target, ids = BitwiseTarget(half("llama"), "tape"), prompt_ids(40)[0]
    cache, logits = passed(target, ids)
    target.hidden_states.read([1])
    with target.watching_hidden():
        other, same = passed(target, ids)
        hidden = target.hidden
    assert hidden is not None
    assert hidden.shape == (40, target.model.config.hidden_size)
    assert torch.equal(logits, same)
    assert same_bits(cache, other)
