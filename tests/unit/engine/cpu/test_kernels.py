import threading
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.engine.cpu import attention as cpu_attention
from retrieval_draft.engine.cpu.attention import WIDE_ATTENTION, wide_attention
from retrieval_draft.engine.cpu.kernels import CpuKernels
from retrieval_draft.engine.substitution import _LentForward
from tests.support.drafters import prompt_ids
from tests.support.models import make


def lent(model: Any) -> int:
    return sum("forward" in module.__dict__ for module in model.modules())


def lent_inside(model: Any) -> int:
    """Layers and norms with our forward; whether whole decoder layers have it, measurements decide."""
    layers = [module for module in model.modules() if hasattr(module, "self_attn")]
    return lent(model) - sum("forward" in module.__dict__ for module in layers)


def ready(model: Any, enabled: bool = True) -> CpuKernels:
    made = CpuKernels(model, enabled)
    made.prepare()
    return made


@pytest.fixture
def model() -> Any:
    return make("gemma3")


@torch.no_grad()
def test_linear_layers_and_norms_are_lent_inside_only(model: Any) -> None:
    ids = prompt_ids()
    stock, kernels = model(ids).logits, ready(model)
    with kernels.applied():
        assert lent_inside(model) == 3 * (7 + 6) + 2
        assert torch.allclose(model(ids).logits, stock, atol=1e-4)
    assert lent(model) == 0
    assert torch.equal(model(ids).logits, stock)


def test_given_back_after_an_error(model: Any) -> None:
    with pytest.raises(KeyError), ready(model).applied():
        raise KeyError
    assert lent(model) == 0


def test_nested_and_overlapping_users_share(model: Any) -> None:
    one, other = ready(model), ready(model)
    first, second = one.applied(), other.applied()
    first.__enter__()
    number = lent(model)
    second.__enter__()
    first.__exit__(None, None, None)
    assert lent(model) == number
    second.__exit__(None, None, None)
    assert lent(model) == 0


def test_two_drafters_in_two_threads_on_one_model(model: Any) -> None:
    prompt = prompt_ids()
    stock = model.generate(prompt, max_new_tokens=30, do_sample=False)
    found: list[bool] = []

    def serve() -> None:
        drafter = RetrievalDrafter.for_model(model)
        for _ in range(3):
            ours = drafter.generate(prompt, max_new_tokens=30, do_sample=False)
            found.append(torch.equal(ours, stock))

    servers = [threading.Thread(target=serve) for _ in range(2)]
    for server in servers:
        server.start()
    for server in servers:
        server.join()
    assert found == [True] * 6
    assert lent(model) == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_the_switch(model: Any, enabled: bool) -> None:
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(lent(model)))
    drafter = RetrievalDrafter.for_model(model, config=DraftConfig(cpu_kernels=enabled))
    seen.clear()
    ours = drafter.generate(prompt_ids(), max_new_tokens=8, do_sample=False)
    assert seen
    assert all(bool(number) is enabled for number in seen)
    assert drafter.kernels.is_active is enabled
    assert lent(model) == 0
    assert torch.equal(ours, model.generate(prompt_ids(), max_new_tokens=8, do_sample=False))


def test_a_compiled_model_and_another_device_are_left_alone(model: Any) -> None:
    model._compiled_call_impl = lambda *_: None
    assert not CpuKernels(model).is_active
    assert not CpuKernels(make("llama").to("meta")).is_active


@torch.no_grad()
def test_experts_and_convolutions_keep_stock() -> None:
    for name, number in (("mixtral", 3 * (4 + 2) + 2), ("gpt2", 1)):
        model = make(name)
        with ready(model).applied():
            assert lent_inside(model) == number, name


def kept(value: Any, seen: set[int]) -> int:
    """Bytes of the tensors and arrays that a function holds, through lists, records and other functions."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor | np.ndarray):
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value.ctypes.data
        fresh = address not in seen
        seen.add(address)
        return value.nbytes if fresh else 0
    inner = list(value) if isinstance(value, list | tuple) else []
    if is_dataclass(value):
        inner += [getattr(value, field.name) for field in fields(value)]
    inner += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    inner += [value._forward] if isinstance(value, _LentForward) else []
    return sum(kept(each, seen) for each in inner)


def test_memory_is_that_of_the_model(model: Any) -> None:
    """Kernels read the model's own weights; norms keep a scaled copy of theirs, which are small."""
    seen = {tensor.data_ptr() for tensor in model.parameters()}
    with ready(model).applied():
        extra = sum(kept(module.__dict__.get("forward"), seen) for module in model.modules())
    assert 0 < extra <= 0.05 * sum(tensor.nbytes for tensor in model.parameters())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bfloat16_attention_is_replaced_where_it_is_torchs(implementation: str) -> None:
    model = make("gemma3", attention=implementation)
    with wide_attention(model), wide_attention(model):
        inside = model.config._attn_implementation
    assert inside == (WIDE_ATTENTION if implementation == "sdpa" else "eager")
    assert model.config._attn_implementation == implementation


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "llama", "mistral"])
def test_bfloat16_attention_in_float32_is_as_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = make(name)
    model = make(name).bfloat16()
    exact.load_state_dict(model.float().state_dict())
    model = model.bfloat16()
    ids = prompt_ids(40)
    expected, stock = exact(ids).logits, model(ids).logits.float()
    monkeypatch.setattr(cpu_attention, "_MAX_TOKENS", 64)
    with wide_attention(model):
        ours = model(ids).logits.float()
    assert (ours - expected).norm() <= 1.2 * (stock - expected).norm()


@pytest.mark.parametrize("worthwhile", [True, False])
def test_bfloat16_models_generate(worthwhile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval_draft.engine.cpu.kernels.is_worthwhile", lambda _: worthwhile)
    model = make("gemma3").bfloat16()
    drafter = RetrievalDrafter.for_model(model)
    out = drafter.generate(prompt_ids(), max_new_tokens=20, do_sample=False)
    assert out.shape[1] == prompt_ids().shape[1] + 20
    assert model.config._attn_implementation == "sdpa"
