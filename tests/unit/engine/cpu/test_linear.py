import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from retrieval_draft.engine.cpu.linear import CpuLinear
from retrieval_draft.engine.cpu.linear_choice import SIZES
from retrieval_draft.engine.substitution import lend_forwards


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 48, dtype=dtype)
        self.second = nn.Linear(48, 32, bias=False, dtype=dtype)
        self.tied = nn.Linear(48, 32, bias=False, dtype=dtype)
        self.tied.weight = self.second.weight

    def forward(self, x: torch.Tensor) -> Any:
        middle = self.first(x)
        return self.second(middle) + self.tied(middle)


def prepared(model: nn.Module) -> CpuLinear:
    made = CpuLinear(model)
    made.prepare()
    return made


def lent(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in module.__dict__}


@pytest.fixture
def model() -> Model:
    return Model()


@torch.no_grad()
def test_layers_tied_ones_too_are_lent_and_given_back(model: Model) -> None:
    x = torch.randn(3, 32)
    stock, made = model(x), prepared(model)
    with lend_forwards(made.forwards()):
        assert lent(model) == {"first", "second", "tied"}
        assert torch.allclose(model(x), stock, atol=1e-5)
        assert torch.allclose(model(x[None]), stock[None], atol=1e-5)
    assert lent(model) == set()
    assert torch.equal(model(x), stock)


def test_choices_are_those_of_the_models_shapes(model: Model) -> None:
    assert CpuLinear(Model().half()).choices() == {}
    choices = prepared(model).choices()
    assert set(choices) == {"float32 48x32", "float32 32x48"}
    assert all(tuple(names) == SIZES for names in choices.values())


@torch.no_grad()
def test_what_was_not_measured_is_left_alone(model: Model) -> None:
    made = prepared(model)
    model.third = nn.Linear(32, 7)
    with lend_forwards(made.forwards()):
        assert "third" not in lent(model)
    made.prepare()
    with lend_forwards(made.forwards()):
        assert "third" in lent(model)


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def _replaced(model: Any) -> None:
    forward = model.first.forward
    model.first.forward = lambda x: forward(x)


def _subclass(model: Any) -> None:
    model.first = Doubled(32, 48)


def _meta(model: Any) -> None:
    model.first = nn.Linear(32, 48, device="meta")


def _double(model: Any) -> None:
    model.first = nn.Linear(32, 48, dtype=torch.float64)


def _columns(model: Any) -> None:
    model.first.weight = nn.Parameter(torch.randn(32, 48).t())


def _mixed(model: Any) -> None:
    model.first.bias = nn.Parameter(model.first.bias.detach().double())


def _empty(model: Any) -> None:
    model.first = nn.Linear(0, 48)


def _quantised(model: Any) -> None:
    quantise: Any = torch.ao.quantization.quantize_dynamic
    model.first = quantise(nn.Sequential(nn.Linear(32, 48)), {nn.Linear})[0]


def _parametrised(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.first)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [_replaced, _subclass, _meta, _double, _columns, _mixed, _empty, _quantised, _parametrised],
)
def test_other_layers_are_left_alone(model: Model, change: Any) -> None:
    change(model)
    before, made = model.first.__dict__.get("forward"), prepared(model)
    with lend_forwards(made.forwards()):
        assert model.first.__dict__.get("forward") is before
        assert {"second", "tied"} <= lent(model)
    assert model.first.__dict__.get("forward") is before


def _integers(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


@torch.no_grad()
def test_layers_of_integers_are_lent_and_given_back(model: Model) -> None:
    _integers(model)
    x, layers = torch.randn(3, 32), {"first", "second", "tied"}
    own, made = model(x), prepared(model)
    assert set(made.choices()) == {"int8 float32 48x32", "int8 float32 32x48"}
    with lend_forwards(made.forwards()):
        assert lent(model) == layers
        assert torch.allclose(model(x), own, atol=1e-5)
        assert torch.allclose(model(x[None]), own[None], atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            model.first(x)
        fresh = Model()
        nn.init.zeros_(fresh.first.weight)
        _integers(fresh)
        model.first.weight = fresh.first.weight
        assert torch.equal(model.first(x), model.first.bias.expand(3, 48))
    assert lent(model) == set()
    # Weights that were replaced are read anew, and the old ones let go.
    gone = weakref.ref(model.second.weight)
    model.second.weight = fresh.second.weight
    del own
    with lend_forwards(made.forwards()):
        assert torch.allclose(model.second(torch.ones(1, 48)), fresh.second(torch.ones(1, 48)), atol=1e-5)
    gc.collect()
    assert gone() is None


def test_gradients_flow_as_ever(model: Model) -> None:
    x = torch.randn(3, 32)
    with lend_forwards(prepared(model).forwards()):
        model(x).sum().backward()
    assert model.first.weight.grad is not None
    assert model.second.weight.grad is not None


@torch.no_grad()
def test_autocast_subclasses_and_strange_inputs_go_stocks_way(model: Model) -> None:
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(3, 32)
    with lend_forwards(prepared(model).forwards()):
        with torch.autocast("cpu", torch.bfloat16):
            assert model.first(x).dtype == torch.bfloat16
        assert type(model.first(x.as_subclass(Tagged))) is Tagged
        with pytest.raises(RuntimeError, match="shape"):
            model.first(torch.randn(3, 31))
        with pytest.raises(RuntimeError, match="dtype"):
            model.first(x.double())
        assert model.first(x[0]).shape == (48,)
        assert model.first(torch.empty(0, 32)).shape == (0, 48)


@torch.no_grad()
def test_hooks_still_run(model: Model) -> None:
    seen: list[str] = []
    model.first.register_forward_hook(lambda *_: seen.append("after"))
    model.first.register_forward_pre_hook(lambda *_: seen.append("before"))
    with lend_forwards(prepared(model).forwards()):
        model.first(torch.randn(1, 32))
    assert seen == ["before", "after"]


@torch.no_grad()
def test_parameters_that_are_replaced_meanwhile_count(model: Model) -> None:
    x = torch.randn(2, 32)
    with lend_forwards(prepared(model).forwards()):
        model.first.bias = nn.Parameter(torch.ones(48))
        assert torch.allclose(model.first(x), x @ model.first.weight.t() + 1, atol=1e-5)
        model.first.weight = nn.Parameter(torch.zeros(48, 32))
        assert torch.equal(model.first(x), torch.ones(2, 48))
        model.first.bias = None
        assert torch.equal(model.first(x), torch.zeros(2, 48))


def test_the_number_of_threads_is_that_of_the_moment(model: Model, two_threads: None) -> None:
    made = prepared(model)
    torch.set_num_threads(1)
    made.prepare()
    assert made._current().threads == 1


def test_a_model_is_freed_with_its_forwards_lent() -> None:
    model = Model()
    context = lend_forwards(list(prepared(model).forwards()))
    context.__enter__()
    gone = weakref.ref(model.first)
    del model
    gc.collect()
    alive = gone() is not None
    context.__exit__(None, None, None)
    # Whoever lent it holds it; nothing else does.
    assert alive
    del context
    gc.collect()
    assert gone() is None
