"""A model that changes after a drafter was made for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from retrieval_draft import RetrievalDrafter
from retrieval_draft.errors import UnsupportedModelError
from tests.support.drafters import prompt_ids
from tests.support.models import make

PROMPT = prompt_ids(vocabulary=60)
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


def resize(rows: int) -> Callable[[Any], Any]:
    return lambda model: model.resize_token_embeddings(rows)


def other_head(model: Any) -> None:
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, 120, bias=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (resize(130), "resized from 97 to 130"),
        (resize(70), "resized from 97 to 70"),
        (other_head, "resized.*head from 97 to 120"),
        (lambda model: model.double(), "torch.float64"),
        (lambda model: model.to(torch.bfloat16), "torch.bfloat16"),
        (lambda model: model.to("meta"), "meta"),
    ],
)
def test_a_change_is_named_at_the_next_request(change: Callable[[Any], Any], message: str) -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(model)
    change(model)
    calls: list[Callable[[], Any]] = [
        lambda: drafter.generate(PROMPT, **OPTIONS),
        lambda: drafter.continuous.prepare(PROMPT, **OPTIONS),
    ]
    if "meta" not in message:
        calls.append(lambda: model.generate(PROMPT, **OPTIONS, custom_generate=drafter))
    for call in calls:
        with pytest.raises(UnsupportedModelError, match=message):
            call()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_model_is_measured_by_both_ends(name: str) -> None:
    model = make(name, tie_word_embeddings=True)
    drafter = RetrievalDrafter.for_model(model)
    model.resize_token_embeddings(140)
    with pytest.raises(UnsupportedModelError, match="resized"):
        drafter.generate(PROMPT, **OPTIONS)
    again = RetrievalDrafter.for_model(model)
    assert torch.equal(again.generate(PROMPT, **OPTIONS), model.generate(PROMPT, **OPTIONS))


def test_another_head_of_the_same_size_and_changed_weights_are_used() -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(model)
    drafter.generate(PROMPT, **OPTIONS)
    head = torch.nn.Linear(model.lm_head.in_features, 97, bias=False)
    torch.nn.init.normal_(head.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    model.lm_head = head
    for _ in range(2):
        assert torch.equal(drafter.generate(PROMPT, **OPTIONS), model.generate(PROMPT, **OPTIONS))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(-2)


def test_training_mode_is_kept_and_decoded_in() -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(model)
    model.train()
    expected = model.generate(PROMPT, **OPTIONS)
    assert torch.equal(drafter.generate(PROMPT, **OPTIONS), expected)
    assert torch.equal(model.generate(PROMPT, **OPTIONS, custom_generate=drafter), expected)
    assert all(module.training for module in model.modules())


def test_gradient_checkpointing_is_named_where_it_is_on() -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    assert torch.equal(drafter.generate(PROMPT, **OPTIONS), model.generate(PROMPT, **OPTIONS))
    model.train()
    for call in (
        lambda: drafter.generate(PROMPT, **OPTIONS),
        lambda: drafter.continuous.prepare(PROMPT, **OPTIONS),
        lambda: RetrievalDrafter.for_model(model),
    ):
        with pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
            call()


@pytest.mark.parametrize(("name", "option"), [("llama", "attention_dropout"), ("gpt2", "resid_pdrop")])
def test_dropout_is_named_while_the_model_trains(name: str, option: str) -> None:
    model = make(name, **{option: 0.25})
    drafter = RetrievalDrafter.for_model(model)
    drafter.generate(PROMPT, **OPTIONS)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"training mode.*dropout"):
        drafter.generate(PROMPT, **OPTIONS)


def test_an_attention_without_masks_is_named() -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(model)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="flash_attention_2"):
        drafter.generate(PROMPT, **OPTIONS)
