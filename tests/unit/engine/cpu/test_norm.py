from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from retrieval_draft.engine.cpu.norm import CpuNorm
from retrieval_draft.engine.substitution import lend_forwards
from tests.support.kernel_twins import rms_norm_numpy

DTYPES = [torch.float32, torch.bfloat16]


def norm(kind: Any, length: int, dtype: torch.dtype) -> Any:
    made = kind(length, eps=1e-6).to(dtype)
    with torch.no_grad():
        made.weight.add_(torch.randn(length, generator=torch.Generator().manual_seed(1)).to(dtype) / 4)
    return nn.ModuleList([made])


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 8, 33, 640])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_both_families_in_both_types(kind: Any, length: int, dtype: torch.dtype) -> None:
    model = norm(kind, length, dtype)
    x = (5 * torch.randn(2, 7, length, generator=torch.Generator().manual_seed(0))).to(dtype)
    stock = model[0](x)
    with lend_forwards(CpuNorm(model).forwards()):
        if length > 1:  # of length one a norm is a sign, and says little of its rule
            assert "forward" in model[0].__dict__
        ours = model[0](x)
        strided = model[0](x.transpose(0, 1))
        assert model[0](x[:0]).shape == (0, 7, length)
    assert "forward" not in model[0].__dict__
    assert ours.dtype == dtype
    assert torch.equal(strided, ours.transpose(0, 1))
    close = {"rtol": 3e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 0.0}
    assert torch.allclose(ours, stock, **close)
    if dtype == torch.bfloat16:
        assert (ours != stock).float().mean() < 0.02


def test_kernel_equals_its_twin() -> None:
    model, x = norm(LlamaRMSNorm, 100, torch.float32), torch.randn(5, 100)
    with torch.no_grad(), lend_forwards(CpuNorm(model).forwards()):
        ours = model[0](x).numpy()
    expected = rms_norm_numpy(x.numpy(), model[0].weight.detach().numpy(), 1e-6)
    assert abs(ours - expected).max() < 1e-5


class CentredRMSNorm(nn.Module):
    """Named like one, and another thing."""

    def __init__(self, length: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(length))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


class BiasedRMSNorm(LlamaRMSNorm):
    def __init__(self, length: int, eps: float) -> None:
        super().__init__(length, eps)
        self.bias = nn.Parameter(torch.ones(length))


@pytest.mark.parametrize("kind", [CentredRMSNorm, BiasedRMSNorm])
def test_other_rules_are_left_alone(kind: Any) -> None:
    assert list(CpuNorm(norm(kind, 32, torch.float32)).forwards()) == []


@torch.no_grad()
def test_other_calls_go_the_modules_way() -> None:
    model, x = norm(LlamaRMSNorm, 32, torch.float32), torch.randn(3, 32)
    with lend_forwards(CpuNorm(model).forwards()):
        assert model[0](x.double()).dtype == torch.float64
        with torch.enable_grad():
            assert model[0](x).requires_grad
        model[0].weight = nn.Parameter(torch.zeros(32))
        assert not model[0](x).any()


@torch.no_grad()
def test_weights_changed_between_requests_are_seen() -> None:
    model, x = norm(Gemma3RMSNorm, 32, torch.float32), torch.randn(3, 32)
    made = CpuNorm(model)
    with lend_forwards(made.forwards()):
        model[0](x)
    model[0].weight.fill_(1.0)
    stock = model[0](x)
    with lend_forwards(made.forwards()):
        assert torch.allclose(model[0](x), stock, atol=1e-5)
