import copy
import gc
import math
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from retrieval_draft import RetrievalDrafter
from retrieval_draft.engine.cpu import decoder_layer, linear_choice
from retrieval_draft.engine.cpu.kernels import CpuKernels
from retrieval_draft.engine.cpu.linear_choice import Choice
from retrieval_draft.engine.target import Target
from tests.support.drafters import prompt_ids
from tests.support.models import SHAPE, make
from tests.support.trees import tree_of

USUAL = ["llama", "qwen2", "qwen3-windowed", "gemma3", "mistral"]
CONTEXT = 75


@pytest.fixture(autouse=True)
def our_matrices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of matrices as small as these, stock is often faster, and layers keep their modules."""
    monkeypatch.setattr(linear_choice, "cache_home", lambda: tmp_path)
    choose_ours(monkeypatch, loss=0.0)


def choose_ours(monkeypatch: pytest.MonkeyPatch, loss: float) -> None:
    """Makes every matrix's kernel the first, or if there is a loss in seconds, stock."""

    def fastest(weights: Any, *_: Any) -> tuple[Choice, dict[str, float]]:
        first, *_, last = linear_choice._kernels(weights[0])
        return Choice(last if loss else first, first, loss), {}

    monkeypatch.setattr(linear_choice, "_fastest", fastest)


def ready(model: Any) -> CpuKernels:
    made = CpuKernels(model)
    made.prepare()
    return made


def lent(kernels: CpuKernels) -> list[Any]:
    return [module for module, _ in kernels._layers.forwards()]


def logits_of_tree(model: Any, kernels: CpuKernels | None, nodes: int = 9) -> torch.Tensor:
    """Logits of a tree of `nodes` after a text, and of a single token after it."""
    target, random = Target(model), np.random.default_rng(0)
    parents = [-1, *(int(random.integers(0, node)) for node in range(1, nodes))]
    tree = tree_of(random.permutation(97)[:nodes].tolist(), parents)
    text = torch.from_numpy(random.integers(0, 97, CONTEXT))
    with torch.no_grad(), (kernels or CpuKernels(model, False)).applied():
        cache = target.cache(256)
        *_, last = target.prefill(cache, text, 1)
        of_tree = target.verify_tree(cache, tree, CONTEXT)
        cache.drop()
        *_, one = target.append(cache, text[:1], CONTEXT)
    return torch.cat([last, of_tree, one])


@pytest.fixture
def no_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens in a layer's own forward are an error, once it is observed."""

    def refuse(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the layer's modules were called")

    original = decoder_layer._forward

    def forward(module: Any, parts: Any, calls: Any, flow: Any) -> Any:
        own, parts.own = (
            parts.own,
            lambda layer, x, *args, **kwargs: (
                own(layer, x, *args, **kwargs) if x.shape[1] > 64 else refuse(layer, x)
            ),
        )
        made = original(module, parts, calls, flow)
        parts.own = own
        return made

    monkeypatch.setattr(decoder_layer, "_forward", forward)


@pytest.mark.parametrize("head", [8, 32])
@pytest.mark.parametrize("name", USUAL)
def test_layers_of_the_usual_structure_agree(name: str, head: int, no_modules: None) -> None:
    model = make(name, head_dim=head)
    kernels = ready(model)
    assert len(lent(kernels)) == 3
    expected = logits_of_tree(model, None)
    assert torch.allclose(logits_of_tree(model, kernels), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", USUAL)
def test_bfloat16_is_rounded_where_the_modules_round(name: str, no_modules: None) -> None:
    exact = logits_of_tree(make(name, head_dim=32), None)
    model = make(name, head_dim=32).bfloat16()
    stock, ours = logits_of_tree(model, None).float(), logits_of_tree(model, ready(model)).float()
    assert (ours - exact).norm() <= 1.2 * (stock - exact).norm()


@pytest.mark.parametrize(("loss", "layers"), [(2e-5, 3), (4e-5, 0), (math.inf, 0)])
def test_matrices_that_stock_multiplies_a_little_faster_alone(
    loss: float, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_ours(monkeypatch, loss)  # seven matrices a layer; what its programs save is 2e-4
    model = make("llama", head_dim=32)
    kernels = ready(model)
    assert len(lent(kernels)) == layers
    expected = logits_of_tree(model, None)
    assert torch.allclose(logits_of_tree(model, kernels), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_few_bits(bits: int, no_modules: None) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = make("llama", head_dim=32, hidden_size=128, intermediate_size=256)
    quanto.quantize(model, weights=quanto.qint8 if bits == 8 else quanto.qint4, exclude="lm_head")
    quanto.freeze(model)
    kernels = ready(model)
    expected = logits_of_tree(model, None)
    assert torch.allclose(logits_of_tree(model, kernels), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generation_is_the_models_own(name: str) -> None:
    model, prompt = make(name, head_dim=32), prompt_ids()
    drafter = RetrievalDrafter.for_model(model)
    ours = drafter.generate(prompt, max_new_tokens=80, do_sample=False)
    assert len(lent(drafter.kernels)) == 3
    assert torch.equal(ours, model.generate(prompt, max_new_tokens=80, do_sample=False))


def other_structures() -> dict[str, Any]:
    shape = {**SHAPE, "hidden_size": 32}
    return {
        "a residual multiplied": transformers.GraniteConfig(**shape, residual_multiplier=0.5),
        "experts": transformers.MixtralConfig(**shape, num_local_experts=4),
        "a layer without positions": transformers.SmolLM3Config(
            **shape, no_rope_layers=[0, 0, 0], layer_types=["full_attention"] * 3
        ),
        "parallel branches": transformers.CohereConfig(**shape),
        "norms over all heads": transformers.Olmo2Config(**shape),
        "another activation": transformers.LlamaConfig(**shape, hidden_act="relu"),
        "a mask of its own": transformers.DogeConfig(**shape),
    }


@pytest.mark.parametrize("name", other_structures())
def test_layers_of_another_structure_keep_their_modules(name: str) -> None:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(other_structures()[name]).eval()
    kernels = ready(model)
    assert lent(kernels) == []
    expected = logits_of_tree(model, None)
    assert torch.allclose(logits_of_tree(model, kernels), expected, rtol=1e-4, atol=2e-4)


def test_a_granite_that_multiplies_by_one_is_usual() -> None:
    model: Any = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SHAPE, attention_multiplier=0.3)
    )
    assert len(lent(ready(model.eval()))) == 3


@pytest.mark.parametrize("part", ["mlp", "self_attn", "self_attn.q_proj", "input_layernorm"])
def test_hooks_in_a_layer_are_called(part: str) -> None:
    model, called = make("llama"), []
    kernels = ready(model)
    model.model.layers[1].get_submodule(part).register_forward_hook(lambda *_: called.append(part))
    expected = logits_of_tree(model, None)
    called.clear()
    assert torch.allclose(logits_of_tree(model, kernels), expected, rtol=1e-4, atol=2e-4)
    assert called


@torch.no_grad()
def test_weights_changed_in_place_are_seen_by_the_next_request() -> None:
    model = make("gemma3")
    kernels = ready(model)
    before = logits_of_tree(model, kernels)
    for layer in model.model.layers:
        layer.post_feedforward_layernorm.weight.add_(0.5)
        layer.mlp.up_proj.weight.mul_(2)
    expected = logits_of_tree(model, None)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert torch.allclose(logits_of_tree(model, kernels), expected, rtol=1e-4, atol=2e-4)


class Negated(nn.Module):
    """As an adapter, a module that comes after another one in its stead."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -x


@torch.no_grad()
@pytest.mark.parametrize("how", ["parameter", "data", "module", "attention"])
def test_replaced_weights_are_seen_at_once(how: str) -> None:
    model = make("llama")
    kernels, target = ready(model), Target(model)
    others = [copy.deepcopy(layer.self_attn) for layer in model.model.layers]
    text = torch.arange(20)
    with kernels.applied():
        *_, before = target.prefill(target.cache(64), text, 1)
        for layer, other in zip(model.model.layers, others, strict=True):
            weight = layer.self_attn.v_proj.weight
            if how == "data":
                weight.data = -weight.data
            elif how == "module":
                layer.self_attn.v_proj = nn.Sequential(layer.self_attn.v_proj, Negated())
            elif how == "attention":
                layer.self_attn = other
                layer.self_attn.v_proj.weight.data = -weight.data
            else:
                layer.self_attn.v_proj.weight = nn.Parameter(-weight)
        *_, after = target.prefill(target.cache(64), text, 1)
    *_, expected = Target(model).prefill(target.cache(64), text, 1)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert torch.allclose(after, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_training_mode_and_other_attention_are_the_modules(attention: str) -> None:
    model = make("llama", attention=attention)
    kernels = ready(model)
    if attention == "sdpa":
        model.model.layers[0].train()
    expected = logits_of_tree(model, None)
    assert torch.allclose(logits_of_tree(model, kernels), expected, rtol=1e-4, atol=2e-4)


def test_a_model_can_be_freed() -> None:
    model = make("llama")
    kernels = ready(model)
    logits_of_tree(model, kernels)
    layer = weakref.ref(model.model.layers[0])
    del model
    for part in (kernels, kernels.linear, kernels._norm, kernels._layers):
        vars(part)["_model"] = None
    gc.collect()
    assert layer() is None


def test_other_threads_attend_while_a_layer_is_observed() -> None:
    found: list[Any] = []
    states = torch.randn(1, 4, 3, 8)

    def attend() -> None:
        module = nn.Module()
        found.append(decoder_layer._record(module, states, states, states, None, scaling=0.5)[0])

    decoder_layer._recording.recorder = decoder_layer._Recorder(torch.zeros(1))
    try:
        thread = threading.Thread(target=attend)
        thread.start()
        thread.join()
    finally:
        decoder_layer._recording.recorder = None
    expected = nn.functional.scaled_dot_product_attention(states, states, states, scale=0.5, is_causal=True)
    assert torch.allclose(found[0], expected.transpose(1, 2))
