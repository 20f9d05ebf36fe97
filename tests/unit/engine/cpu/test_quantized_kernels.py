import numpy as np
import pytest
import torch
from torch.nn.functional import linear

from retrieval_draft.engine.cpu.quantized_kernels import quantized
from retrieval_draft.engine.cpu.quantized_weights import QuantizedWeight
from tests.support.kernel_twins import linear_quantized_numpy
from tests.support.tensors import normal

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33, 63, 64, 65, 130)
ROWS = [(1, 1), (5, 3), (7, 16), (3, 33), (24, 640), (25, 641), (63, 1283), (129, 2048)]
"""Rows and lengths of int8 with a scale by row, which take any length."""

CASES = [
    *(("rows", 1, *shape, 0) for shape in ROWS),
    *(("groups", 1, *shape) for shape in [(5, 64, 32), (25, 1344, 96), (63, 2048, 128), (24, 640, 640)]),
    *(("nibbles", 2, *shape) for shape in [(2, 64, 32), (50, 1344, 96), (66, 2048, 128), (24, 640, 640)]),
]

cases = pytest.mark.parametrize(("name", "planes", "rows", "length", "group"), CASES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def made(
    planes: int, rows: int, length: int, group: int, dtype: torch.dtype = torch.float32
) -> tuple[QuantizedWeight, np.ndarray]:
    """A weight, and its integers one by one."""
    random = np.random.default_rng(rows * length)
    low, high = (-128, 128) if planes == 1 else (0, 16)
    integers = random.integers(low, high, (rows, length)).astype(np.int8)
    data = torch.from_numpy(integers)
    if planes == 2:
        half = rows // 2
        data = torch.from_numpy((integers[:half] | integers[half:] << 4).astype(np.uint8))
    shape = (rows, length // group, 2) if group else (rows,)
    terms = torch.from_numpy(random.uniform(0.01, 0.02, shape).astype(np.float32))
    if group:
        terms[..., 1] *= -8
    return QuantizedWeight(torch.empty(rows, length, dtype=dtype, device="meta"), data, terms), integers


def exact(weight: QuantizedWeight, integers: np.ndarray) -> torch.Tensor:
    """The weights as float64."""
    q, terms = torch.from_numpy(integers).double(), weight.terms.double()
    if not weight.group:
        return q * terms[:, None]
    each = terms.repeat_interleave(weight.group, dim=1)
    return q * each[..., 0] + each[..., 1]


@cases
@dtypes
def test_error_against_float64_is_that_of_rounding(
    name: str, planes: int, rows: int, length: int, group: int, dtype: torch.dtype
) -> None:
    weight, integers = made(planes, rows, length, group, dtype)
    wide, bias = exact(weight, integers), normal(rows, dtype=dtype, seed=1)
    call = quantized(weight, bias)
    for tokens in (1, 2, 3, 4, 5, 16, 65):
        x = normal(tokens, length, dtype=dtype, seed=tokens)
        got = call(x)
        expected = linear(x.double(), wide, bias.double())
        assert got.dtype == dtype
        # Of sums of `length` products, each of which may be far larger than its sum.
        size = linear(x.double().abs(), wide.abs(), bias.double().abs())
        rounding = 4 * torch.finfo(torch.float32).eps * size
        if dtype == torch.bfloat16:
            rounding = rounding + 2.0**-8 * expected.abs()
        assert ((got.double() - expected).abs() <= rounding).all()


@cases
@dtypes
def test_a_token_is_the_same_to_the_last_bit_in_any_company_on_any_number_of_threads(
    name: str, planes: int, rows: int, length: int, group: int, dtype: torch.dtype
) -> None:
    weight, _ = made(planes, rows, length, group, dtype)
    bias, x = normal(rows, dtype=dtype, seed=1), normal(130, length, dtype=dtype, seed=2)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            call = quantized(weight, bias)
            found.append(torch.cat([call(row[None]) for row in x]))
            for tokens in SIZES:
                assert torch.equal(call(x[:tokens]), found[0][:tokens])
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*found)


@cases
def test_kernel_equals_its_numpy_twin(name: str, planes: int, rows: int, length: int, group: int) -> None:
    weight, integers = made(planes, rows, length, group)
    x, bias = normal(5, length, seed=1), normal(rows, seed=2)
    got = quantized(weight, bias)(x).numpy()
    terms = weight.terms.numpy()
    scale, shift = (terms[..., 0], terms[..., 1]) if group else (terms[:, None], None)
    expected = linear_quantized_numpy(x.numpy(), integers, scale, shift, bias.numpy())
    assert np.allclose(got, expected, rtol=1e-6, atol=1e-6 * float(np.abs(expected).max()))
    assert (got == expected).mean() > 0.95


@dtypes
def test_strides_of_weights_and_inputs(dtype: torch.dtype) -> None:
    whole = torch.randint(-128, 128, (40, 200), dtype=torch.int8)
    data = whole[3:37:2, 5:105]
    own, terms = torch.empty(17, 100, dtype=dtype, device="meta"), torch.rand(17)
    x = normal(100, 2, 20, dtype=dtype).permute(1, 2, 0)
    got = quantized(QuantizedWeight(own, data, terms))(x)
    assert got.shape == (2, 20, 17)
    assert torch.equal(got, quantized(QuantizedWeight(own, data.contiguous(), terms))(x.contiguous()))


def test_nothing_in_nothing_out() -> None:
    call = quantized(made(1, 6, 10, 0)[0])
    assert call(torch.empty(0, 10)).shape == (0, 6)
    assert call(torch.empty(2, 0, 10)).shape == (2, 0, 6)


def test_worked_example() -> None:
    data, scales = torch.tensor([[1, 0], [1, 1]], dtype=torch.int8), torch.tensor([2.0, 3.0])
    weight = QuantizedWeight(torch.empty(2, 2, device="meta"), data, scales)
    call = quantized(weight, torch.tensor([0.0, 5.0]))
    assert call(torch.tensor([[1.0, 2.0]])).tolist() == [[2.0, 14.0]]


@pytest.mark.parametrize("tokens", [4, 20])
def test_infinity_and_nan_stay_in_their_token(tokens: int) -> None:
    data = torch.ones(5, 70, dtype=torch.int8)
    x = torch.ones(tokens, 70)
    x[1, 1], x[2, 69] = float("inf"), float("nan")
    got = quantized(QuantizedWeight(torch.empty(5, 70, device="meta"), data, torch.ones(5)))(x)
    assert got[1].isinf().all()
    assert got[2].isnan().all()
    assert (got[[token for token in range(tokens) if token not in (1, 2)]] == 70).all()


def test_integers_changed_in_place_are_seen() -> None:
    weight, _ = made(1, 30, 64, 0)
    call, x = quantized(weight), normal(2, 64, seed=1)
    weight.data.fill_(1)
    before = call(x)
    weight.data.fill_(2)
    assert torch.equal(call(x), 2 * before)
