import numpy as np
import pytest
import torch
from numba import config as numba_config
from torch.nn.functional import linear

from retrieval_draft.engine.cpu import linear_kernels
from retrieval_draft.engine.cpu.linear_kernels import KERNELS, OURS, Outputs, is_tiled_available
from tests.support.kernel_twins import linear_numpy, linear_tokenwise_numpy
from tests.support.tensors import normal

SHAPES = [(1, 1), (5, 3), (7, 16), (3, 33), (24, 640), (25, 641), (63, 1283), (640, 100), (129, 2048)]
SIZES = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 130)
DTYPES = [torch.float32, torch.bfloat16]

ours = pytest.mark.parametrize("name", OURS)
everyone = pytest.mark.parametrize("name", [name for name in KERNELS if name != "amx"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)
shapes = pytest.mark.parametrize(("rows", "length"), SHAPES)


def error(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> float:
    exact = linear(x.double(), w.double(), None if bias is None else bias.double())
    return float((got.double() - exact).norm())


def running_sum(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x Wᵀ + b in float32, term by term."""
    total = torch.zeros(len(x), len(w)) if bias is None else bias.float().expand(len(x), -1)
    for at in range(x.shape[1]):
        total = total + x[:, at, None].float() * w[:, at].float()
    return total.to(x.dtype)


@everyone
@dtypes
@shapes
@pytest.mark.parametrize("biased", [False, True])
def test_error_against_float64_is_that_of_stock_or_of_a_running_sum(
    name: str, dtype: torch.dtype, rows: int, length: int, biased: bool
) -> None:
    w, bias = normal(rows, length, dtype=dtype), normal(rows, dtype=dtype, seed=1) if biased else None
    call = KERNELS[name](w, bias)
    numbers = (1, 3, 16, 65)
    inputs = [normal(tokens, length, dtype=dtype, seed=tokens) for tokens in numbers]
    # Of stock, too, the error of a token depends on how many there are: its worst counts.
    stock = max(error(linear(x, w, bias), x, w, bias) / len(x) ** 0.5 for x in inputs)
    for x in inputs:
        got = call(x)
        assert got.dtype == dtype
        assert got.shape == (len(x), rows)
        # A sum of few terms may be exact in stock: allow one rounding. In how many parts stock sums depends
        # on the machine; a kernel may sum in one, which rounds about as much as another running sum.
        rounding = torch.finfo(dtype).eps * float(got.double().norm())
        one_part = 1.25 * error(running_sum(x, w, bias), x, w, bias)
        assert error(got, x, w, bias) <= max(2 * stock * len(x) ** 0.5, rounding, one_part)


@ours
@dtypes
@shapes
def test_a_token_is_the_same_to_the_last_bit_in_any_company_on_any_number_of_threads(
    name: str, dtype: torch.dtype, rows: int, length: int
) -> None:
    w, bias = normal(rows, length, dtype=dtype), normal(rows, dtype=dtype, seed=1)
    x = normal(130, length, dtype=dtype, seed=2)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            call = KERNELS[name](w, bias)
            found.append(torch.cat([call(row[None]) for row in x]))
            for tokens in SIZES:
                assert torch.equal(call(x[:tokens]), found[0][:tokens])
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*found)


@pytest.mark.parametrize(("name", "twin"), [("tiled", linear_numpy), ("tokenwise", linear_tokenwise_numpy)])
@shapes
def test_kernel_equals_its_numpy_twin(name: str, twin: object, rows: int, length: int) -> None:
    w, x, bias = normal(rows, length), normal(5, length, seed=1), normal(rows, seed=2)
    got = KERNELS[name](w, bias)(x).numpy()
    expected = twin(x.numpy(), w.numpy(), bias.numpy())  # type: ignore[operator]
    assert np.allclose(got, expected, rtol=1e-6, atol=1e-6 * float(np.abs(expected).max()))
    assert (got == expected).mean() > 0.95


@ours
@dtypes
def test_strides_of_weights_and_inputs(name: str, dtype: torch.dtype) -> None:
    whole = normal(40, 200, dtype=dtype)
    w = whole[3:37:2, 5:105]
    assert w.stride() == (400, 1)
    x = normal(100, 2, 20, dtype=dtype, seed=1).permute(1, 2, 0)
    got = KERNELS[name](w, None)(x)
    assert got.shape == (2, 20, 17)
    assert torch.equal(got, KERNELS[name](w.contiguous(), None)(x.contiguous()))
    assert error(got, x, w, None) <= 2 * error(linear(x, w), x, w, None)


@everyone
@dtypes
def test_nothing_in_nothing_out(name: str, dtype: torch.dtype) -> None:
    call = KERNELS[name](normal(6, 10, dtype=dtype), None)
    assert call(torch.empty(0, 10, dtype=dtype)).shape == (0, 6)
    assert call(torch.empty(2, 0, 10, dtype=dtype)).shape == (2, 0, 6)


@everyone
def test_worked_example(name: str) -> None:
    call = KERNELS[name](torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([0.0, 5.0]))
    assert call(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [[1, 8], [3, 12]]


@ours
@dtypes
def test_infinity_and_nan_stay_in_their_token(name: str, dtype: torch.dtype) -> None:
    w = torch.ones(5, 70, dtype=dtype)
    x = torch.ones(20, 70, dtype=dtype)
    x[3, 1], x[7, 69] = float("inf"), float("nan")
    got = KERNELS[name](w, None)(x)
    assert got[3].isinf().all()
    assert got[7].isnan().all()
    others = [token for token in range(20) if token not in (3, 7)]
    assert (got[others] == 70).all()


@ours
def test_weights_changed_in_place_are_seen(name: str) -> None:
    w = normal(30, 64)
    call, x = KERNELS[name](w, None), normal(2, 64, seed=1)
    before = call(x)
    w.mul_(2)
    assert torch.equal(call(x), 2 * before)


@ours
@dtypes
def test_results_in_memory_that_is_kept(name: str, dtype: torch.dtype) -> None:
    w, x = normal(70_001, 33, dtype=dtype), normal(64, 33, dtype=dtype, seed=1)
    got = KERNELS[name](w, None)(x)
    assert got.nbytes > linear_kernels._KEPT_BYTES
    assert error(got, x, w, None) <= 2 * error(linear(x, w), x, w, None)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    # 1 + 2**-8 lies halfway between two bfloat16, 1 + 3 * 2**-8 too; evens are 1 and 1 + 2**-6.
    w = torch.tensor([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8]]).bfloat16()
    for name in OURS:
        got = KERNELS[name](w, None)(torch.ones(1, 2).bfloat16())
        assert got.tolist() == [[1.0, 1.0 + 2.0**-6]]


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(4, 6).double(),
        torch.ones(4, 6).half(),
        torch.ones(4, 6).to(torch.int8),
        torch.ones(6, 4).t(),
        torch.ones(4),
    ],
)
def test_what_our_kernels_cannot_read(weight: torch.Tensor) -> None:
    assert not is_tiled_available(weight)


def test_without_a_compiler_nothing_of_ours_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_tiled_available(torch.ones(4, 6))
    monkeypatch.setattr(numba_config, "DISABLE_JIT", 1)
    assert not is_tiled_available(torch.ones(4, 6))


def test_memory_of_outputs_is_used_again_once_no_tensor_reads_it() -> None:
    outputs, shape = Outputs(), (3, 1 << 19)
    first = outputs.tensor(shape, torch.float32)
    begin = first.data_ptr()
    assert (first.shape, first.dtype, begin % 64) == (shape, torch.float32, 0)
    row = first[1].fill_(7.0)
    del first
    second = outputs.tensor(shape, torch.float32)
    second.zero_()
    assert second.data_ptr() != begin
    assert (row == 7.0).all()
    del row
    assert outputs.tensor((2, 1 << 20), torch.bfloat16).data_ptr() == begin
    assert outputs.tensor((3, 1 << 20), torch.float32).data_ptr() != begin


def test_small_outputs_are_memory_of_their_own() -> None:
    outputs = Outputs()
    kept = [outputs.tensor((2, 8), torch.bfloat16) for _ in range(2)]
    assert kept[0].data_ptr() != kept[1].data_ptr()
