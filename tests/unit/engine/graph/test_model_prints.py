"""Changes of a model that a captured pass would not see, and those that it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from retrieval_draft.engine.graph.model_prints import model_print
from retrieval_draft.engine.target import Target
from tests.support.models import make


def new_tensor(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data = model.model.layers[0].mlp.up_proj.weight.data.clone()


def new_layer(model: Any) -> None:
    model.model.layers[1] = make("llama").model.layers[1]


CHANGES: list[Callable[[Any], Any]] = [
    new_tensor,
    new_layer,
    lambda model: model.train(),
    lambda model: model.double(),
    lambda model: model.model.layers[0].register_forward_hook(lambda *_: None),
    lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.5),
    lambda model: setattr(model.model.norm, "forward", lambda states: states),
    lambda model: model.set_attn_implementation("eager"),
    lambda model: setattr(model.model.layers[2], "adapters", {"one": {"scale": 2.0}}),
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change: Callable[[Any], Any]) -> None:
    model = make("llama")
    before = model_print(model)
    assert model_print(model) == before
    change(model)
    assert model_print(model) != before


def test_values_may_change_and_passes_run() -> None:
    model = make("llama")
    before = model_print(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        model(torch.tensor([[1, 2, 3]]))
    target = Target(model, "off")
    with target.watching_hidden():
        assert model_print(model) == before
