"""The cache of chains: what stays, what comes back and what is passed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, MistralConfig, Qwen2Config
from transformers.cache_utils import Cache

from retrieval_draft.engine.cache.chain_cache import ChainCache
from tests.support.models import SHAPE

WINDOW = 6


class Recurrence:
    """A layer whose state is written in place, as those of linear attention are."""

    def __init__(self) -> None:
        self.state = torch.zeros(1, 1)
        self.seen = {0: False}

    def add(self, ids: torch.Tensor) -> None:
        for token in ids[0].tolist():
            self.state.mul_(3).add_(token)
        self.seen[0] = True


def full() -> DynamicCache:
    return DynamicCache(config=Qwen2Config(**{**SHAPE, "num_hidden_layers": 1}))


def windowed() -> DynamicCache:
    return DynamicCache(config=MistralConfig(**{**SHAPE, "num_hidden_layers": 1}, sliding_window=WINDOW))


def recurrent() -> DynamicCache:
    cache = full()
    layers: Any = cache.layers
    layers.append(Recurrence())
    return cache


def passed(inner: Cache, ids: torch.Tensor) -> None:
    """As a model's pass: the tokens themselves are keys, and the recurrence's input."""
    layer: Any = inner.layers[0]
    states = ids[:, None, :, None].float()
    layer.update(states, states)
    for other in inner.layers[1:]:
        other.add(ids)


def held(cache: ChainCache) -> list[Any]:
    """Keys and states."""
    layer: Any = cache.inner.layers[0]
    return [layer.keys.flatten().tolist(), *(other.state.item() for other in cache.inner.layers[1:])]


def begun(make: Any, text: list[int]) -> ChainCache:
    cache = ChainCache(make)
    ids = torch.tensor([text])
    passed(cache.inner, ids)
    cache.passed(cache.inner, len(text))
    return cache


def step(cache: ChainCache, chain: list[int], kept: int) -> list[int]:
    """One step, and the tokens that it passed."""
    if len(chain) > 1:
        cache.save(len(chain))
    ids = cache.stage(torch.tensor([chain]))
    passed(cache.inner, ids)
    cache.commit(None, kept, kept)
    return ids[0].tolist()


@pytest.mark.parametrize("make", [full, windowed, recurrent])
def test_text_in_any_chains_is_the_text_token_by_token(make: Any) -> None:
    random = torch.Generator().manual_seed(1)
    cache, text = begun(make, [3, 1, 4]), [3, 1, 4]
    for number in range(40):
        size = int(torch.randint(1, 5, (), generator=random))
        kept = int(torch.randint(1, size + 1, (), generator=random)) if number % 3 else size
        right = torch.randint(5, 90, (kept,), generator=random).tolist()
        step(cache, [*right, *[99] * (size - kept)], kept)
        text += right
        assert cache.get_seq_length() + cache.pending == len(text)
    step(cache, [7], 1)  # commits what is pending
    assert cache.pending == 0
    assert held(cache) == held(begun(make, [*text, 7])) or make is recurrent
    layer: Any = cache.inner.layers[0]
    assert layer.get_seq_length() == len(text) + 1


def test_states_come_back_and_what_was_accepted_goes_in_front() -> None:
    cache = begun(recurrent, [1, 2])
    assert step(cache, [3, 4, 9, 9], 2) == [3, 4, 9, 9]
    assert held(cache) == [[1.0, 2.0], 5.0]
    assert cache.pending == 2
    assert step(cache, [5, 9], 1) == [3, 4, 5, 9]
    assert cache.carries(0) == 3
    assert step(cache, [6, 7], 2) == [3, 4, 5, 6, 7], "all accepted: nothing is passed again"
    assert cache.pending == 0
    assert held(cache) == held(begun(recurrent, [1, 2, 3, 4, 5, 6, 7]))


def test_what_can_be_cropped_is_never_passed_again() -> None:
    for make, text in ((full, [1, 2, 3, 4, 5, 6, 7, 8]), (windowed, [1])):
        cache = begun(make, text)
        assert cache.carries(1) is None
        assert step(cache, [3, 4, 9], 2) == [3, 4, 9]
        assert cache.pending == 0
        assert held(cache) == [[*map(float, text), 3.0, 4.0]]


def test_a_full_window_comes_back() -> None:
    cache = begun(windowed, [1, 2, 3, 4, 5, 6, 7])
    step(cache, [8, 9, 9], 1)
    assert held(cache) == [[3.0, 4.0, 5.0, 6.0, 7.0]]
    assert cache.pending == 1


def test_states_are_copied_only_for_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = begun(recurrent, [1, 2])
    taken: list[int] = []
    monkeypatch.setattr(cache._saved, "take", lambda inner: taken.append(1))
    for token in (3, 4):
        step(cache, [token], 1)
    assert not taken
    step(cache, [5, 6], 2)
    assert len(taken) == 1


def test_the_copy_keeps_its_memory() -> None:
    cache = begun(recurrent, [1, 2])
    step(cache, [3, 9], 1)
    before = [each.data_ptr() for each in cache._saved.tensors()]
    step(cache, [4, 5, 6], 3)
    step(cache, [7, 9], 1)
    assert [each.data_ptr() for each in cache._saved.tensors()] == before


def test_a_failed_pass_over_drafts_is_taken_back_and_one_without_cannot_be() -> None:
    cache = begun(recurrent, [1, 2])
    cache.save(2)
    passed(cache.inner, cache.stage(torch.tensor([[3, 4]])))
    cache.drop()
    assert held(cache) == [[1.0, 2.0], 5.0]
    passed(cache.inner, cache.stage(torch.tensor([[3]])))
    cache.commit(None, 1, 1)
    cache.stage(torch.tensor([[3]]))
    cache.drop()
    with pytest.raises(RuntimeError, match="A pass failed"):
        cache.stage(torch.tensor([[3]]))
    assert not cache.keep(0)


def test_a_clone_has_states_of_its_own() -> None:
    cache = begun(recurrent, [1, 2])
    step(cache, [3, 9], 1)
    other = cache.clone()
    step(other, [4], 1)
    assert held(cache) == [[1.0, 2.0], 5.0]
    assert held(other) == held(begun(recurrent, [1, 2, 3, 4]))


def test_going_back_needs_layers_that_can_be_cropped() -> None:
    cache = begun(full, [1, 2, 3, 4])
    assert cache.keep(2)
    assert held(cache) == [[1.0, 2.0]]
    stuck = begun(recurrent, [1, 2, 3])
    assert not stuck.keep(2)
    assert stuck.keep(3)
    assert not stuck.keep(4)


def test_a_pass_of_others_is_seen() -> None:
    cache = begun(recurrent, [1, 2])
    states = torch.ones(1, 1, 1, 1)
    cache.update(states, states, 0)
    assert cache.get_seq_length() == 3
    assert not cache.keep(2)
    whole = begun(full, [1, 2])
    whole.update(states, states, 0)
    assert whole.keep(2)
    assert whole.get_seq_length() == 2


def test_bytes_count_states_and_their_copy() -> None:
    cache = begun(recurrent, [1, 2])
    before = cache.nbytes
    assert before == 2 * 2 * 4 + 4
    step(cache, [3, 9], 1)
    assert cache.nbytes == before + 4


def test_reset_forgets_all() -> None:
    cache = begun(recurrent, [1, 2])
    step(cache, [3, 9], 1)
    cache.reset()
    assert (cache.get_seq_length(), cache.pending, cache.longest) == (0, 0, 0)
