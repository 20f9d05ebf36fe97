"""Copies of a drafter, and of a model whose generate is a drafter's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from retrieval_draft import RetrievalDrafter
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
