"""Attention on CUDA: its arithmetic with the kernels replaced, its shapes on pretended tensors; numbers on a
card are in tests/system/test_cuda.py."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from retrieval_draft.engine.attention import cuda as cuda_attention
from retrieval_draft.engine.attention.cuda import CUDA_ATTENTION, attend_grouped, attend_unmasked
from tests.support.models import make

CUDA = torch.device("cuda", 0)


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    lse: bool,
    dropout: float,
    causal: bool,
    *,
    scale: Any,
) -> tuple[Tensor]:
    assert not dropout
    assert not causal
    assert bias.shape == (*query.shape[:3], key.shape[2])
    assert bias.stride(-2) % 8 == 0, "rows of the mask are aligned"
    assert key.stride(0) == 0 or key.shape[0] == 1, "keys are not copied"
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return ((scores + bias).softmax(-1) @ value,)


def plain(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("kind", ["bool", "additive", "aligned"])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 1)])
def test_heads_that_share_keys_are_a_batch_over_them(heads: int, shared: int, kind: str) -> None:
    torch.manual_seed(0)
    nodes, keys = 5, 21
    query, (key, value) = torch.randn(1, heads, nodes, 8), torch.randn(2, 1, shared, keys, 8)
    seen = (torch.rand(1, 1, nodes, keys) < 0.6) | (torch.arange(keys) == 0)
    mask = (
        seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    )
    if kind == "aligned":
        mask = torch.zeros(1, 1, nodes, 24)[..., :keys].copy_(mask)
    with mock.patch.object(torch.ops.aten, "_scaled_dot_product_efficient_attention", efficient):
        found = attend_grouped(query, key, value, mask, None)
    torch.testing.assert_close(found, plain(query, key, value, seen), atol=1e-6, rtol=1e-5)


def test_an_aligned_mask_is_not_copied() -> None:
    mask = torch.zeros(1, 1, 4, 32)[..., :21]
    assert cuda_attention._bias(mask, torch.float32) is mask


@pytest.mark.parametrize("nodes", [1, 6])
def test_results_are_where_and_as_large_as_they_should_be(nodes: int) -> None:
    with FakeTensorMode():
        query = torch.empty(1, 8, nodes, 64, device=CUDA, dtype=torch.bfloat16)
        key, value = torch.empty(2, 1, 2, 40, 64, device=CUDA, dtype=torch.bfloat16).unbind(0)
        mask = torch.empty(1, 1, nodes, 48, device=CUDA, dtype=torch.bfloat16).narrow(-1, 0, 40)
        for out in (
            attend_grouped(query, key, value, mask, 0.1),
            attend_unmasked(query, key, value, False, 0.1),
        ):
            assert out.shape == query.shape
            assert out.device == CUDA
            assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("what", "taken"),
    [
        ({}, True),
        ({"mask": True}, True),
        ({"dtype": torch.float32}, False),
        ({"size": 20}, False),
        ({"size": 320}, False),
        ({"rows": 2}, False),
        ({"softcap": 30.0}, False),
        ({"keys": 9, "causal": True}, False),
        ({"device": torch.device("cpu")}, False),
    ],
)
def test_only_calls_that_the_kernels_take_are_ours(what: dict[str, Any], taken: bool) -> None:
    size, rows, keys = what.get("size", 64), what.get("rows", 1), what.get("keys", 8)
    given: dict[str, Any] = {"device": what.get("device", CUDA), "dtype": what.get("dtype", torch.bfloat16)}
    with (
        FakeTensorMode(),
        torch.no_grad(),
        mock.patch.object(cuda_attention, "is_ordinary_call", return_value=True),
    ):
        query = torch.empty(rows, 4, 8, size, **given)
        key = torch.empty(rows, 2, keys, size, **given)
        mask = torch.empty(1, 1, 8, keys, **given) if what.get("mask") else None
        extra = {"softcap": what.get("softcap")}
        assert cuda_attention._is_ours(query, key, key, mask, what.get("causal", False), extra) is taken


def test_other_calls_are_torchs_own() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    with torch.no_grad():
        found, _ = cuda_attention._attend(module, query, key, key, None, scaling=0.25)
    seen = torch.ones(3, 3, dtype=torch.bool).tril()
    torch.testing.assert_close(found.transpose(1, 2), plain(query, key, key, seen))


@pytest.mark.parametrize(("attention", "inside"), [("sdpa", CUDA_ATTENTION), ("eager", "eager")])
def test_models_are_lent_it_on_cuda_alone(attention: str, inside: str) -> None:
    model = make("llama", attention=attention)
    with cuda_attention.cuda_attention(model, torch.device("cpu")):
        assert model.config._attn_implementation == attention
    with (
        mock.patch.object(cuda_attention, "_has_kernels", return_value=True),
        cuda_attention.cuda_attention(model, CUDA),
        cuda_attention.cuda_attention(model, CUDA),
    ):
        assert model.config._attn_implementation == inside
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("device", "capability", "hip", "has"),
    [
        (CUDA, (9, 0), None, True),
        (CUDA, (8, 0), None, True),
        (CUDA, (7, 5), None, False),
        (CUDA, (9, 0), "6.4", False),
        (torch.device("cpu"), (9, 0), None, False),
    ],
)
def test_cards_without_the_kernels_keep_torchs_choice(
    device: torch.device, capability: tuple[int, int], hip: str | None, has: bool
) -> None:
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch("torch.version.hip", hip),
    ):
        assert cuda_attention._has_kernels.__wrapped__(device) is has
