from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from retrieval_draft.engine.cpu.quantized_kernels import quantized
from retrieval_draft.engine.cpu.quantized_weights import QuantizedWeight, quantized_weight

quanto = pytest.importorskip("optimum.quanto")

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def layer(
    weights: str, rows: int = 48, length: int = 192, dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(length, rows, dtype=dtype))
    quanto.quantize(model, weights=getattr(quanto, weights), **options)
    quanto.freeze(model)
    found: nn.Module = model[0]
    return found


def found(module: nn.Module) -> QuantizedWeight:
    weight = quantized_weight(module)
    assert weight is not None
    return weight


@torch.no_grad()
def check(module: Any) -> None:
    """Holds the layer to its own library's product, as near to the exact one as that is."""
    weight = found(module)
    x = torch.randn(7, module.weight.shape[1]).to(module.weight.dtype)
    exact = linear(x.double(), module.weight.dequantize().double(), module.bias.double())
    size = linear(x.double().abs(), module.weight.dequantize().double().abs()).max()
    ours, own = quantized(weight, module.bias)(x), module(x)
    eps = torch.finfo(weight.dtype).eps
    assert (ours.double() - exact).norm() <= 2 * (own.double() - exact).norm() + eps * exact.norm()
    assert float((ours - own).abs().max()) <= 4 * eps * float(size)


@dtypes
@pytest.mark.parametrize(("rows", "length"), [(48, 192), (7, 33), (640, 128)])
def test_quantos_int8(rows: int, length: int, dtype: torch.dtype) -> None:
    module = layer("qint8", rows, length, dtype)
    weight = found(module)
    assert (weight.planes, weight.group, weight.kind) == (1, 0, "int8")
    check(module)


@dtypes
@pytest.mark.parametrize(("length", "group"), [(192, 96), (96, 96), (1344, 96)])
def test_quantos_int4(length: int, group: int, dtype: torch.dtype) -> None:
    module = layer("qint4", 48, length, dtype)
    weight = found(module)
    assert (weight.planes, weight.group, weight.kind) == (2, group, f"int4/{group}")
    check(module)


def test_integers_are_the_layers_own() -> None:
    for weights in ("qint8", "qint4"):
        module: Any = layer(weights)
        inner = module.weight._data
        inner = inner._data if weights == "qint4" else inner
        assert found(module).data.data_ptr() == inner.data_ptr()
    module = layer("qint8")
    assert found(module).terms.data_ptr() == module.weight._scale.data_ptr()


def _thawed() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 48))
    quanto.quantize(model, weights=quanto.qint8)
    thawed: nn.Module = model[0]
    return thawed


class _Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def _overridden() -> nn.Module:
    module = _Doubled(192, 48)
    module.weight = layer("qint8").weight
    return module


@pytest.mark.parametrize(
    "module",
    [
        lambda: layer("qint8", activations=quanto.qint8),
        lambda: layer("qfloat8"),
        lambda: layer("qint2"),
        lambda: layer("qint4", rows=7),
        lambda: layer("qint4", length=33),
        lambda: layer("qint8", dtype=torch.float16),
        lambda: layer("qint4", rows=64, length=256, dtype=torch.bfloat16),
        _thawed,
        _overridden,
        lambda: nn.Linear(64, 48),
        lambda: nn.Embedding(64, 48),
        nn.Identity,
    ],
    ids=[
        "inputs quantised", "float8", "two bits", "odd rows", "a group of 33", "float16", "torch's packing",
        "not frozen", "another forward", "float32", "embedding", "no weight",
    ],
)  # fmt: skip
def test_what_our_kernels_cannot_read_is_left_to_its_library(module: Any) -> None:
    assert quantized_weight(module()) is None


@pytest.mark.parametrize("change", ["dtype", "shape", "strides", "scales", "missing"])
def test_other_tensors_inside_than_we_know_are_left_alone(change: str) -> None:
    module: Any = layer("qint8")
    weight = module.weight
    if change == "dtype":
        weight._data = weight._data.short()
    elif change == "shape":
        weight._data = weight._data[1:]
    elif change == "strides":
        weight._data = weight._data.t().contiguous().t()
    elif change == "scales":
        weight._scale = weight._scale[1:]
    else:
        del weight._scale
    assert quantized_weight(module) is None


def ao(config: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 48, dtype=dtype))
    torchao.quantize_(model, getattr(torchao, config)(**options))
    made: nn.Module = model[0]
    return made


@dtypes
def test_torchaos_int8(dtype: torch.dtype) -> None:
    module = ao("Int8WeightOnlyConfig", dtype)
    assert found(module).kind == "int8"
    check(module)


@dtypes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
def test_torchaos_groups(bits: int, mapping: str, dtype: torch.dtype) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    granularity = torchao.PerGroup(64)
    module = ao(
        "IntxWeightOnlyConfig", dtype, weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity,
        mapping_type=getattr(primitives.MappingType, mapping),
    )  # fmt: skip
    assert found(module).kind == "int8/64"
    check(module)


@pytest.mark.parametrize(
    "config", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"]
)
def test_torchaos_quantised_inputs_are_left_alone(config: str) -> None:
    assert quantized_weight(ao(config)) is None
