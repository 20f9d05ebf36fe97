"""Copies of a drafter, and of a model whose generate is a drafter's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from retrieval_draft import RetrievalDrafter
from retrieval_draft.engine.substitution import is_free
from retrieval_draft.errors import InvalidInputError
from tests.support.drafters import prompt_ids
from tests.support.models import make

PROMPT = prompt_ids()
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def test_a_models_copy_has_a_drafter_of_its_own() -> None:
    model = make("llama")
    expected = model.generate(PROMPT, **OPTIONS)
    drafter = RetrievalDrafter.for_model(model)
    model.generate = drafter.generate
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(-1)
    again = copy.deepcopy(copied)  # before its drafter was made
    for each in (copied, again):
        found = each.generate(PROMPT, **OPTIONS)
        assert torch.equal(found, type(model).generate(each, PROMPT, **OPTIONS))
        assert not torch.equal(found, expected)
        assert each.generate.__self__ is not drafter
    assert torch.equal(model.generate(PROMPT, **OPTIONS), expected)


def unpickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301


@pytest.mark.parametrize("by", [copy.deepcopy, unpickled])
def test_a_copy_made_during_a_generation_reads_its_own_weights(by: Callable[[Any], Any]) -> None:
    """The forwards that a model is lent meanwhile read the weights that they were made for."""
    model = make("llama", hidden_size=256, intermediate_size=512)
    drafter = RetrievalDrafter.for_model(model)
    copies: list[Any] = []

    class Copying(BaseStreamer):  # type: ignore[misc]
        def put(self, value: object) -> None:
            if not copies and any("forward" in module.__dict__ for module in model.modules()):
                copies.append(by(model))

        def end(self) -> None:
            pass

    drafter.generate(PROMPT, streamer=Copying(), **OPTIONS)
    (copied,) = copies
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(-0.5)
    expected = type(model).generate(copied, PROMPT, **OPTIONS)
    fresh = make("llama", hidden_size=256, intermediate_size=512)
    fresh.load_state_dict(copied.state_dict())
    assert torch.equal(expected, fresh.generate(PROMPT, **OPTIONS))
    mended = RetrievalDrafter.for_model(copied)
    assert torch.equal(mended.generate(PROMPT, **OPTIONS), expected)
    assert all(is_free(module) for module in copied.modules())


def test_a_copy_whose_drafter_cannot_be_made_says_so_each_time() -> None:
    model = make("llama")
    model.generate = RetrievalDrafter.for_model(model).generate
    copied = copy.deepcopy(model).train()
    copied.model.gradient_checkpointing = True
    for _ in range(2):
        with pytest.raises(ValueError, match="gradient checkpointing"):
            copied.generate(PROMPT, **OPTIONS)
    copied.eval()
    assert torch.equal(copied.generate(PROMPT, **OPTIONS), model.generate(PROMPT, **OPTIONS))


@pytest.mark.parametrize("call", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_drafter_alone_is_not_copied(call: Callable[[Any], Any]) -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(model)
    with pytest.raises(InvalidInputError, match="for_model"):
        call(drafter)
    model.generate = drafter.generate
    with pytest.raises(InvalidInputError, match=r"del model\.generate"):
        pickle.dumps(model)


def test_an_unknown_attribute_is_named() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        RetrievalDrafter.for_model(make("llama")).nothing  # noqa: B018
