"""Settings of torch that a caller may have made: default dtype and device, inference mode, a seed."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import retrieval_draft
from retrieval_draft import DraftConfig, RetrievalDrafter
from tests.support.drafters import prompt_ids
from tests.support.models import CACHE, make

PROMPT = prompt_ids()
GREEDY = {"max_new_tokens": 24, "do_sample": False}
SAMPLED = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 3}
FACTORIES = {
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "tensor",
    "rand",
    "randn",
    "randint",
    "as_tensor",
    "eye",
    "linspace",
    "logspace",
    "randperm",
    "empty_strided",
    "scalar_tensor",
}


def small(model: torch.nn.Module) -> RetrievalDrafter:
    return RetrievalDrafter.for_model(model, config=DraftConfig(adjacency_rows=1024))  # type: ignore[arg-type]


def test_every_tensor_is_made_with_a_device_and_a_dtype() -> None:
    home = Path(retrieval_draft.__file__).parent
    loose = []
    for path in [*home.glob("*.py"), *home.glob("engine/**/*.py"), *home.glob("methods/*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            of_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
            if of_torch and call.func.attr in FACTORIES:
                named = {keyword.arg for keyword in call.keywords}
                wanted = {"device"} if call.func.attr == "arange" else {"device", "dtype"}
                loose += [f"{path.name}:{call.lineno}"] if wanted - named else []
    assert not loose


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    model = make("llama")
    expected = [small(model).generate(PROMPT, **options) for options in (GREEDY, SAMPLED)]
    torch.set_default_dtype(dtype)
    try:
        drafter = small(model)
        found = [drafter.generate(PROMPT, **options) for options in (GREEDY, SAMPLED)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


def test_the_default_device_does_not_matter() -> None:
    model, mask = make("llama"), torch.ones_like(PROMPT)
    expected = [small(model).generate(PROMPT, mask, **options) for options in (GREEDY, SAMPLED)]
    with torch.device("meta"):
        drafter = small(model)
        found = [drafter.generate(PROMPT, mask, **options) for options in (GREEDY, SAMPLED)]
    assert all(map(torch.equal, found, expected))


Calls = Callable[[RetrievalDrafter, torch.nn.Module], Iterator[torch.Tensor]]


def inside_then_outside(drafter: RetrievalDrafter, model: torch.nn.Module) -> Iterator[torch.Tensor]:
    with torch.inference_mode():
        drafter.warm_up()
        yield drafter.generate(PROMPT, **GREEDY)
    yield drafter.generate(PROMPT, **GREEDY)


def growing_inside(drafter: RetrievalDrafter, model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield drafter.generate(PROMPT, **GREEDY)
    with torch.inference_mode():
        drafter.generate(PROMPT.repeat(2, 3), **GREEDY, pad_token_id=0)
    yield drafter.generate(PROMPT, **GREEDY)


def cache_from_inside(drafter: RetrievalDrafter, model: torch.nn.Module) -> Iterator[torch.Tensor]:
    with torch.inference_mode():
        out = drafter.generate(PROMPT[:, :9], **GREEDY, return_dict_in_generate=True)
    yield drafter.generate(PROMPT, **GREEDY, **{CACHE: out[CACHE]})


def cache_from_outside(drafter: RetrievalDrafter, model: torch.nn.Module) -> Iterator[torch.Tensor]:
    out = drafter.generate(PROMPT[:, :9], **GREEDY, return_dict_in_generate=True)
    with torch.inference_mode():
        yield drafter.generate(PROMPT, **GREEDY, **{CACHE: out[CACHE]})


@pytest.mark.parametrize(
    "calls", [inside_then_outside, growing_inside, cache_from_inside, cache_from_outside]
)
@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode_may_come_and_go(calls: Calls, made_inside: bool) -> None:
    model = make("llama")
    expected = model.generate(PROMPT, **GREEDY)
    with torch.inference_mode(made_inside):
        drafter = small(model)
    for found in calls(drafter, model):
        assert torch.equal(found, expected)


def test_nothing_is_drawn_from_torchs_generator() -> None:
    model = make("llama", hidden_size=96, intermediate_size=80)  # shapes that no other test has measured
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drafter = RetrievalDrafter.for_model(model)
    drafter.warm_up()
    drafter.generate(PROMPT, **GREEDY)
    drafter.generate(PROMPT, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)
