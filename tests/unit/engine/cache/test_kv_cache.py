"""SpeculativeCache against a cache that simply concatenates what was accepted."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen3NextConfig

from retrieval_draft.engine.cache.kv_cache import SpeculativeCache, SpeculativeLayer, layer_windows
from retrieval_draft.errors import UnsupportedModelError
from tests.support.models import CONFIGS, WINDOW


def states(count: int, dims: tuple[int, int] = (4, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, 2, count, dims[0]), torch.randn(1, 2, count, dims[1])


@pytest.mark.parametrize("dims", [(4, 4), (6, 4)])
@pytest.mark.parametrize("window", [None, 2, 5, 16, 300])
def test_random_steps_equal_concatenation(window: int | None, dims: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = SpeculativeLayer(window)
    keys, values = states(0, dims)
    for step in range(120):
        size = int(torch.randint(1, 40 if step else 700, (), generator=generator))
        length, expected_first = keys.shape[-2], 0
        if window is not None:
            expected_first = max(0, length - window + 1)
        new = states(size, dims)
        staged = step > 0 and bool(torch.randint(0, 4, (), generator=generator))
        assert layer.get_mask_sizes(size) == (length - expected_first + size, expected_first)
        seen = layer.update(*new, staged=staged)
        for part, old, added in zip(seen, (keys, values), new, strict=True):
            assert torch.equal(part, torch.cat([old[:, :, expected_first:], added], 2))
        path = list(range(size))
        if staged:
            kept = torch.rand(size, generator=generator) < 0.3
            path = [0, *(i for i in range(1, size) if kept[i])]
            lead = next((i for i, node in enumerate(path) if node != i), len(path))
            moved = torch.tensor(path[lead:]) if lead < len(path) else None
            layer.commit(moved, lead, len(path))
        keys = torch.cat([keys, new[0][:, :, path]], 2)
        values = torch.cat([values, new[1][:, :, path]], 2)
        first = 0 if window is None else max(0, keys.shape[-2] - window + 1)
        assert layer.get_seq_length() == keys.shape[-2]
        assert torch.equal(layer.keys, keys[:, :, first:])
        assert torch.equal(layer.values, values[:, :, first:])
    if window is not None:
        assert layer.capacity <= window - 1 + max(window - 1, 256)


def test_path_already_in_place_moves_nothing() -> None:
    layer = SpeculativeLayer()
    layer.update(*states(3))
    seen = layer.update(*states(4), staged=True)[0].clone()
    before = layer._buffers[0].data_ptr()
    layer.commit(None, 3, 3)
    assert layer.get_seq_length() == 6
    assert layer._buffers[0].data_ptr() == before
    assert torch.equal(layer.keys, seen[:, :, :6])


def test_capacity_hint_means_no_growth() -> None:
    layer = SpeculativeLayer(capacity=500)
    layer.update(*states(100))
    before = layer._buffers[0].data_ptr()
    for _ in range(400):
        layer.update(*states(1))
    assert layer._buffers[0].data_ptr() == before


def test_drop_forgets_staged_nodes() -> None:
    cache = SpeculativeCache(LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2))
    cache.update(*states(3), 0)
    cache.stage(True)
    cache.update(*states(5), 0)
    cache.stage(False)
    cache.drop()
    assert cache.get_seq_length() == 3
    # Layer 1 was never updated, as layers that share another's keys are not.
    cache.commit(torch.tensor([2]), 1, 2)
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 0]
    assert cache.nbytes > 0


def test_crop_takes_text_off_the_end_while_the_window_allows() -> None:
    layer = SpeculativeLayer(4)
    keys = states(10)
    layer.update(*keys)
    for _ in range(6):
        layer.update(*states(1))
    layer.crop(-3)
    assert layer.get_seq_length() == 13
    with pytest.raises(ValueError, match="left the window"):
        SpeculativeLayer(4).crop(-1)


def test_reset_starts_over() -> None:
    layer = SpeculativeLayer(4)
    layer.update(*states(300))
    layer.reset()
    new = states(3)
    assert torch.equal(layer.update(*new)[0], new[0])


def test_layer_kinds_follow_the_configuration() -> None:
    assert layer_windows(CONFIGS["gemma3"]()) == [
        ("sliding_attention", WINDOW), ("full_attention", None), ("sliding_attention", WINDOW),
    ]  # fmt: skip
    assert layer_windows(MistralConfig(num_hidden_layers=1, sliding_window=7)) == [("sliding_attention", 7)]
    assert layer_windows(CONFIGS["llama"]()) == [("full_attention", None)] * 3


def test_recurrent_layers_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        SpeculativeCache(Qwen3NextConfig(num_hidden_layers=4))


@pytest.mark.parametrize(
    ("dims", "dtype"), [((8, 8), torch.float32), ((6, 4), torch.bfloat16), ((3, 3), torch.float16)]
)
def test_a_path_is_moved_in_all_layers_as_in_each(dims: tuple[int, int], dtype: torch.dtype) -> None:
    """By a kernel where slots are of whole words; the last ones are not."""
    config = MistralConfig(num_hidden_layers=3, hidden_size=8, num_attention_heads=2, sliding_window=None)
    cache = SpeculativeCache(config)
    cache.layers[1].window, cache.layers[1].is_sliding, cache.layers[1]._keeps = 7, True, False
    alone = [SpeculativeLayer(layer.window) for layer in cache.layers]
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        size = int(torch.randint(1, 20, (), generator=generator))
        new = [[part.to(dtype) for part in states(size, dims)] for _ in alone]
        cache.stage(True)
        for index, (layer, given) in enumerate(zip(alone, new, strict=True)):
            cache.update(*given, index)
            layer.update(*given, staged=True)
        cache.stage(False)
        path = [0, *(i for i in range(1, size) if torch.rand((), generator=generator) < 0.4)]
        lead = next((i for i, node in enumerate(path) if node != i), len(path))
        moved = torch.tensor(path[lead:]) if lead < len(path) else None
        cache.commit(moved, lead, len(path))
        for layer, own in zip(alone, cache.layers, strict=True):
            layer.commit(moved, lead, len(path))
            assert torch.equal(layer.keys, own.keys), step
            assert torch.equal(layer.values, own.values), step
