"""Device mistakes, found without a device: the step's tensor code under FakeTensorMode with device cuda."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from benchmarks.gpu_check.attention import VARIANTS, attention_inputs
from retrieval_draft.bench.ties import unit
from retrieval_draft.engine.attention.tree_mask import TreeAttention
from retrieval_draft.engine.cache.kv_cache import SpeculativeLayer
from retrieval_draft.engine.logits import LogitReader, top_k
from retrieval_draft.engine.sampling.noise import GumbelNoise

CUDA = torch.device("cuda", 0)


class Views(TorchFunctionMode):
    """Indexing and copies by other means: torch without CUDA takes a device guard in its own and fails."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.copy_:
            assert args[0].device == args[1].device, "a copy between devices waits for the device"
            return torch.ops.aten.copy_.default(*args)
        if function is not torch.Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        tensor, index = args
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            fill = tensor.ndim - sum(part is not None for part in index) + 1
            index = (*index[:at], *[slice(None)] * fill, *index[at + 1 :])
        axis = 0
        for part in index:
            if part is None:
                tensor = tensor.unsqueeze(axis)
            elif isinstance(part, int):
                tensor, axis = tensor.select(axis, part), axis - 1
            else:
                begin, end, step = part.indices(tensor.shape[axis])
                assert step == 1
                tensor = tensor.narrow(axis, begin, max(0, end - begin))
            axis += 1
        return tensor


@pytest.fixture
def fake() -> Iterator[None]:
    with mock.patch("torch.cuda.is_available", return_value=True), FakeTensorMode(), Views():
        yield


def states(count: int) -> torch.Tensor:
    return torch.empty((1, 2, count, 8), device=CUDA, dtype=torch.bfloat16)


def test_mixing_devices_is_noticed(fake: None) -> None:
    with pytest.raises(Exception, match=r"device|Device"):
        torch.empty(3, device=CUDA) + torch.empty(3)


@pytest.mark.parametrize("window", [None, 16])
def test_cache_stays_on_its_device(fake: None, window: int | None) -> None:
    layer = SpeculativeLayer(window)
    layer.update(states(300), states(300))
    for _ in range(60):
        keys, _ = layer.update(states(9), states(9), staged=True)
        assert keys.device == CUDA
        layer.commit(torch.empty(3, dtype=torch.int64, device=CUDA), 1, 4)
    assert layer.keys.device == CUDA


@pytest.mark.parametrize("window", [None, 16])
def test_masks_are_made_on_the_device(fake: None, window: int | None) -> None:
    attention = TreeAttention({"a": window, "b": None}, torch.bfloat16, CUDA)
    for nodes, length in ((1, 40), (8, 40), (4, 44), (16, 400)):
        up = torch.empty(3 * nodes + 2 + nodes * nodes // 8 + 1, dtype=torch.int64, device=CUDA)
        inputs = attention.unpack(up, nodes, 2, min(nodes - 1, 3), length)
        assert inputs.input_ids.shape == (1, nodes)
        assert inputs.moved.shape == (2,)
        assert inputs.position_ids.device == CUDA
        if nodes > 1:
            assert inputs.attention_mask["b"].shape == (1, 1, nodes, length + nodes)
            assert inputs.attention_mask["b"].device == CUDA


@pytest.mark.parametrize("vocabulary", [97, 262_144, 70_001])
def test_logits_are_packed_on_the_device(fake: None, vocabulary: int) -> None:
    logits = torch.empty((16, vocabulary), device=CUDA, dtype=torch.bfloat16)
    assert all(part.device == CUDA for part in top_k(logits, 8))
    packed = LogitReader(8).pack(logits)
    assert packed.device == CUDA
    assert packed.shape == (16, 18)
    assert packed.dtype == torch.int32


def test_noise_is_made_on_the_device(fake: None) -> None:
    assert GumbelNoise(1, 100, CUDA).at(3).device == CUDA


@pytest.mark.parametrize("rows", [[1], [4, 4], [1, 8, 3]])
def test_logits_of_a_batch_are_packed_in_one_piece(fake: None, rows: list[int]) -> None:
    """The predictions of all rows of a pass go to the host in one copy, for any sizes."""
    packed = LogitReader(8).pack(torch.empty((sum(rows), 32_000), device=CUDA, dtype=torch.float16))
    assert packed.shape == (sum(rows), 18)
    assert packed.is_contiguous()
    assert packed.device == CUDA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_are_measured_on_the_device(fake: None, dtype: torch.dtype) -> None:
    assert unit(torch.empty((5, 9), device=CUDA), dtype).device == CUDA


@pytest.mark.parametrize("name", ["torch's choice, repeated heads", "efficient, groups as batch"])
def test_attention_of_the_check_stays_on_the_device(fake: None, name: str) -> None:
    given = attention_inputs(8, 2, 64, 1, 40, torch.bfloat16, CUDA)
    assert all(each is None or each.device == CUDA for each in given)
    out = VARIANTS[name][0](*given)
    assert out.device == CUDA
    assert out.shape == (1, 8, 1, 64)
