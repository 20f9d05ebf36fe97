"""Changes of weights and adapters that keys of earlier texts do not outlive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from retrieval_draft.engine.model_version import ModelVersion
from tests.support.models import make


def write(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.add_(1)


def write_uncounted(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.data.mul_(2)


def replace(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def load(model: Any) -> None:
    model.load_state_dict(make("llama", seed=1).state_dict())


def convert(model: Any) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize("change", [write, write_uncounted, replace, load, convert])
def test_a_change_of_the_weights_is_seen(change: Callable[[Any], None]) -> None:
    model = make("llama")
    version = ModelVersion(model)
    before = version.current()
    model(torch.tensor([[1, 2, 3]]))
    assert version.current() == before
    change(model)
    assert version.current() != before
    assert version.current() == version.current()


def test_adapters_have_versions_of_their_own() -> None:
    peft = pytest.importorskip("peft")
    model = make("llama")
    version = ModelVersion(model)
    plain = version.current()
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="a")
    wrapped.add_adapter("b", config)
    a = version.current()
    assert a != plain
    wrapped.set_adapter("b")
    b = version.current()
    assert b != a
    with wrapped.disable_adapter():
        assert version.current() not in (a, b, plain)
    assert version.current() == b
    wrapped.merge_adapter()
    assert version.current() not in (a, b)
