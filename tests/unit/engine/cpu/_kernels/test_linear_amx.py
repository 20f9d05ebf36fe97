"""The matrix unit's product; off the machines that have one only the packing."""

import numpy as np
import pytest
import torch

from retrieval_draft.engine.cpu._kernels.amx_tile import TILE_COLUMNS, TILE_ROWS, has_amx
from retrieval_draft.engine.cpu._kernels.linear import MAX_TOKENS, widen_rows
from retrieval_draft.engine.cpu._kernels.linear_amx import AMX_BLOCK, pack_pairs
from retrieval_draft.engine.cpu.linear_kernels import KERNELS, is_amx_available

needs_amx = pytest.mark.skipif(not has_amx(), reason="no AMX")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("tokens", [1, 7, 8, 21, 64])
@pytest.mark.parametrize("length", [32, 96])
def test_pack_pairs(tokens: int, length: int) -> None:
    width, stride = -(-tokens // TILE_ROWS) * TILE_ROWS, length + 32
    x = normal(tokens, length)
    wide = torch.empty(tokens, stride)
    for row, line in zip(x, wide, strict=True):
        widen_rows(row.data_ptr(), line.data_ptr(), 1, length)
    got = torch.full((length // 2, width, 2), 9.0).bfloat16()
    pack_pairs(wide.data_ptr(), stride, got.data_ptr(), tokens, length, width)
    expected = torch.zeros(length // 2, width, 2).bfloat16()
    expected[:, :tokens] = x.view(tokens, length // 2, 2).transpose(0, 1)
    assert torch.equal(got, expected)


@needs_amx
@pytest.mark.parametrize("tokens", [1, 4, 16, 17, 33, 64, 70])
@pytest.mark.parametrize(
    ("rows", "length"), [(16, 32), (48, 640), (AMX_BLOCK + 16, 2080), (3 * AMX_BLOCK, 64)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products(has_bias: bool, rows: int, length: int, tokens: int) -> None:
    x, w, bias = normal(tokens, length), normal(rows, length, seed=1), normal(rows, seed=2)
    exact = x.double() @ w.double().T + (bias.double() if has_bias else 0)
    got = KERNELS["amx"](w, bias if has_bias else None)(x).double()
    # Half a unit of bfloat16, beside the rounding of sums in float32 that almost cancel.
    assert ((got - exact).abs() <= exact.abs() * 2**-8 + 1e-5 * length).all()


@needs_amx
def test_a_token_does_not_depend_on_others_or_on_threads() -> None:
    x, w = normal(MAX_TOKENS, 640), normal(480, 640, seed=1)
    layer = KERNELS["amx"](w, None)
    every = layer(x)
    for tokens in (1, 3, 16, 40):
        assert torch.equal(layer(x[:tokens]), every[:tokens])
    torch.set_num_threads(2)
    try:
        assert torch.equal(KERNELS["amx"](w, None)(x), every)
    finally:
        torch.set_num_threads(1)


@needs_amx
def test_not_a_number_stays_in_its_token() -> None:
    x, w = normal(20, 64), normal(32, 64, seed=1)
    x[3, 5] = float("nan")
    got = KERNELS["amx"](w, None)(x)
    assert got[3].isnan().all()
    assert np.isfinite(got[[*range(3), *range(4, 20)]].float().numpy()).all()


def test_which_weights_can_be_read() -> None:
    good = torch.zeros(2 * TILE_ROWS, 3 * TILE_COLUMNS).bfloat16()
    assert is_amx_available(good) == has_amx()
    for bad in (good.float(), good[:-1], good[:, :-1]):
        assert not is_amx_available(bad)
        with pytest.raises(ValueError, match="AMX multiplies"):
            KERNELS["amx"](bad, None)
