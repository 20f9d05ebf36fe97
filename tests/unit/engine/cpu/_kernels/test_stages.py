from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from retrieval_draft.engine.cpu._kernels.stages import GELU_TANH, MAX_QUERIES, SILU
from retrieval_draft.engine.cpu._kernels.vector_tile import LANES, STEP
from retrieval_draft.engine.cpu.stage_program import At, StageProgram, stage_function
from tests.support.kernel_twins import attend_numpy, gate_numpy, rms_norm_numpy
from tests.support.tensors import normal

DTYPES = [torch.float32, torch.bfloat16]
THREADS = [1, 2]


def run(name: str, fields: Sequence[int], threads: int = 2) -> None:
    program = StageProgram([])
    program.stage(stage_function(name), [0, *fields])
    program.barrier()
    program.run([], threads)


def bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))


def in_order(x: torch.Tensor) -> torch.Tensor:
    """Rows of float32 with the even indices of each whole step first, as `linear` wants them for bfloat16."""
    whole = x.shape[-1] - x.shape[-1] % STEP
    steps = x[..., :whole].reshape(*x.shape[:-1], -1, STEP // 2, 2).transpose(-1, -2)
    return torch.cat([steps.reshape(*x.shape[:-1], whole), x[..., whole:]], -1)


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    few = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-9}
    return torch.allclose(got.float(), expected.float(), **few)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 33, 640])
@pytest.mark.parametrize("parts", ["second", "residual", "sandwich", "all"])
def test_add_and_norm(parts: str, length: int, dtype: torch.dtype) -> None:
    x, residual = normal(7, length, dtype=dtype), normal(7, length, dtype=dtype, seed=1)
    one, two = normal(length, seed=2), normal(length, seed=3)
    hidden, y = torch.zeros_like(x), torch.zeros(7, length)
    half = dtype == torch.bfloat16
    first, adds, second = parts in ("sandwich", "all"), parts != "second", parts in ("second", "all")
    run(
        "add_and_norm",
        [
            x.data_ptr(), residual.data_ptr() if adds else 0, one.data_ptr() if first else 0,
            hidden.data_ptr(), two.data_ptr() if second else 0, y.data_ptr(), 7, length,
            bits(1e-6), bits(1e-5), 0, 0, int(half), int(half),
        ],
    )  # fmt: skip
    expected = x.float()
    if first:
        expected = torch.from_numpy(rms_norm_numpy(expected.numpy(), one.numpy(), 1e-6)).to(dtype).float()
    if adds:
        expected = (expected + residual.float()).to(dtype).float()
    assert close(hidden, expected, dtype)
    if second:
        normed = torch.from_numpy(rms_norm_numpy(hidden.float().numpy(), two.numpy(), 1e-5)).to(dtype).float()
        assert close(y, in_order(normed) if half else normed, dtype)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [5, 512, 1290])
@pytest.mark.parametrize("kind", [SILU, GELU_TANH])
def test_gate(kind: int, length: int, dtype: torch.dtype, threads: int) -> None:
    g, u = 8 * normal(3, length, dtype=dtype), normal(3, length, dtype=dtype, seed=1)
    g[0, :4] = torch.tensor([0.0, -100.0, 100.0, 1e-30])
    y, half = torch.zeros(3, length), dtype == torch.bfloat16
    run("gate", [g.data_ptr(), u.data_ptr(), y.data_ptr(), 3, length, kind, int(half), int(half)], threads)
    activated = silu(g) if kind == SILU else gelu(g, approximate="tanh")
    expected = (activated * u).float()
    assert close(y, in_order(expected) if half else expected, dtype)
    if not half:
        assert np.allclose(y, gate_numpy(g.numpy(), u.numpy(), kind), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gate_of_what_is_no_number(value: float) -> None:
    g, u, y = torch.tensor([[value, 1.0]]), torch.ones(1, 2), torch.zeros(1, 2)
    run("gate", [g.data_ptr(), u.data_ptr(), y.data_ptr(), 1, 2, SILU, 0, 0])
    assert y[0, 1].item() == pytest.approx(silu(torch.tensor(1.0)).item())
    assert not torch.isfinite(y[0, 0])  # torch's SiLU of -inf is no number either


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 64), (4, 256)])
@pytest.mark.parametrize("norms", [False, True])
def test_head_positions(norms: bool, heads: int, dim: int, dtype: torch.dtype) -> None:
    x, angles = normal(5, heads, dim, dtype=dtype), torch.cat([normal(5, dim // 2, seed=1)] * 2, -1)
    cos, sin, scale = angles.cos().to(dtype), angles.sin().to(dtype), normal(dim, seed=2)
    expected = x.clone()
    if norms:
        rows = rms_norm_numpy(x.float().view(-1, dim).numpy(), scale.numpy(), 1e-6)
        expected = torch.from_numpy(rows).view_as(x).to(dtype)
    a, b = expected.chunk(2, -1)
    expected = expected * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]
    y = torch.zeros(heads, 7, dim, dtype=dtype)
    for out, strides in ((y[:, 2:], (7 * dim, dim)), (x, (dim, heads * dim))):
        run(
            "head_positions",
            [
                x.data_ptr(), scale.data_ptr() if norms else 0, cos.data_ptr(), sin.data_ptr(), 5, heads, dim,
                bits(1e-6), 0, int(dtype == torch.bfloat16), out.data_ptr(), *strides,
            ],
        )  # fmt: skip
    assert close(x, expected, dtype)
    assert torch.equal(y[:, 2:].transpose(0, 1), x)
    assert not y[:, :2].any()


def test_heads_without_positions_are_moved() -> None:
    x, y = normal(3, 2, 4, dtype=torch.bfloat16), torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    run("head_positions", [x.data_ptr(), 0, 0, 0, 3, 2, 4, 0, 0, 1, y.data_ptr(), 12, 4])
    assert torch.equal(y.transpose(0, 1), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [7, 512, 1100])
@pytest.mark.parametrize("packed", [False, True])
def test_layout(packed: bool, length: int, dtype: torch.dtype) -> None:
    tokens, half = 5, dtype == torch.bfloat16
    x = normal(tokens, length, dtype=dtype)
    columns = LANES if packed else 0
    y = torch.full((length, columns) if packed else (tokens, length), 9.0)
    run("layout", [x.data_ptr(), y.data_ptr(), tokens, length, int(half), columns, int(half), 0])
    expected = in_order(x.float()) if half else x
    if packed:
        expected = torch.cat([expected.T, torch.zeros(length, columns - tokens)], 1)
    assert torch.equal(y, expected)


CASES = [(2, 1, STEP, 1, 5), (9, 3, 64, 8, 264), (4, 1, 256, 13, 64), (4, 4, 96, 64, 130), (6, 2, 128, 3, 65)]


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_type", ["float", "bool"])
@pytest.mark.parametrize(("heads", "of_keys", "dim", "tokens", "keys"), CASES)
@pytest.mark.parametrize("at_once", [5, MAX_QUERIES])
def test_attend(
    at_once: int, heads: int, of_keys: int, dim: int, tokens: int, keys: int, mask_type: str,
    dtype: torch.dtype, threads: int,
) -> None:  # fmt: skip
    if dim % STEP:
        pytest.skip("heads of this size go to torch on this machine")
    query = 3 * normal(tokens, heads, dim, dtype=dtype)
    room = normal(2, of_keys, keys + 9, dim, dtype=dtype, seed=1)
    key, value = room[0, :, 4 : 4 + keys], room[1, :, 4 : 4 + keys]
    seen = normal(tokens, keys, seed=2) > -0.5
    seen[:, -1] = True
    # A whole run of keys that one token does not see, and what comes after a mask's row.
    seen[0, : keys - 1] = False
    wide = torch.zeros(tokens, keys + 3, dtype=torch.bool)
    wide[:, :keys] = seen
    added = torch.zeros(wide.shape, dtype=dtype).masked_fill(~wide, torch.finfo(dtype).min)
    mask = wide if mask_type == "bool" else added
    out = torch.full_like(query, float("nan"))
    run(
        "attend",
        [
            query.data_ptr(), key.data_ptr(), value.data_ptr(), mask.data_ptr(), out.data_ptr(), tokens,
            heads, dim, keys, key.stride(0), value.stride(0), mask.stride(0), heads // of_keys,
            bits(dim**-0.5), int(dtype == torch.bfloat16), int(mask_type == "bool"), at_once,
        ],
        threads,
    )  # fmt: skip
    keys_of_all, values_of_all = (
        each.float()[None].repeat_interleave(heads // of_keys, 1) for each in (key, value)
    )
    expected = scaled_dot_product_attention(
        query.float().transpose(0, 1)[None], keys_of_all, values_of_all, seen[None, None]
    )[0].transpose(0, 1)
    few = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-7}
    assert torch.allclose(out.float(), expected, **few)
    twin = attend_numpy(
        query.float().numpy(), key.float().numpy(), value.float().numpy(),
        np.where(seen.numpy(), 0, -np.inf), dim**-0.5,
    )  # fmt: skip
    assert np.allclose(twin, expected, rtol=1e-3, atol=1e-5)


def test_a_token_that_sees_nothing_gives_numbers() -> None:
    """Padding of a tree sees no key; its output is not used, and must not spoil the others'."""
    query, key, out = normal(2, 1, STEP), normal(1, 70, STEP), torch.zeros(2, 1, STEP)
    mask = torch.zeros(2, 70)
    mask[1] = -float("inf")
    at = [each.data_ptr() for each in (query, key, key, mask, out)]
    run("attend", [*at, 2, 1, STEP, 70, 0, 0, 70, 1, bits(1.0), 0, 0, 2])
    assert torch.isfinite(out).all()


def test_program_words_that_are_given_later() -> None:
    g = normal(2, 40)
    y = torch.zeros(2, 40)
    program = StageProgram(["g", "y"])
    program.stage(stage_function("gate"), [0, At("g"), At("g"), At("y"), 2, 40, SILU, 0, 0])
    program.run([g.data_ptr(), y.data_ptr()], 2)
    assert np.allclose(y, gate_numpy(g.numpy(), g.numpy(), SILU), rtol=1e-5, atol=1e-6)
