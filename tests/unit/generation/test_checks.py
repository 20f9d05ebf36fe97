"""Checks at the edge: each refusal by name, and nothing else refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from retrieval_draft.errors import InvalidInputError, TokenizerMismatchError, UnsupportedGenerationError
from retrieval_draft.generation.checks import (
    arguments_of_generate,
    best_of_options,
    check_generation,
    check_new_tokens,
    check_options,
    check_prompt,
    check_tokenizer,
    reference_tokens,
    strip_prompts,
)
from tests.support.models import make

IDS = torch.tensor([[1, 2]])
MODEL = make("llama")


def test_arguments_mean_what_their_places_mean() -> None:
    mask, config, processors, options = torch.ones(1, 2), GenerationConfig(), [object()], {"top_k": 3}
    assert arguments_of_generate((IDS, mask, config), {}) == (IDS, mask, config)
    assert arguments_of_generate((IDS, config), {}) == (IDS, None, config)
    assert arguments_of_generate((IDS, config, processors), options) == (IDS, None, config)
    assert options == {"top_k": 3, "logits_processor": processors}
    assert arguments_of_generate((IDS, None, processors), given := {}) == (IDS, None, None)
    assert given == {"logits_processor": processors}


def test_arguments_by_name_are_taken_out_of_the_options() -> None:
    options: dict[str, Any] = {"inputs": IDS, "attention_mask": torch.ones(1, 2), "top_k": 3}
    found, mask, config = arguments_of_generate((), options)
    assert found is IDS
    assert mask is not None
    assert config is None
    assert options == {"top_k": 3}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ((IDS,), {"input_ids": IDS}, "input_ids was given twice"),
        ((), {"inputs": IDS, "input_ids": IDS}, "inputs and input_ids"),
        ((), {"attention_mask": [1]}, "attention_mask is a list; it must be a Tensor"),
        ((), {"generation_config": {}}, "generation_config is a dict"),
        ((), {"logits_processor": ()}, "logits_processor is a tuple"),
    ],
)
def test_arguments_that_cannot_be_sorted_are_refused(given: Any, options: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        arguments_of_generate(given, options)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1]], None, "is a list"),
        (torch.tensor([[1.0]]), None, "dtype torch.float32"),
        (torch.tensor([1]), None, r"shape \(1,\)"),
        (IDS, torch.ones(1, 3), "must be equal"),
        (torch.zeros(1, 0, dtype=torch.int64), None, "empty"),
    ],
)
def test_prompts_have_a_type_and_a_shape(ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_prompt(ids, mask)


def test_prompts_of_either_integer_pass() -> None:
    check_prompt(IDS, None)
    check_prompt(IDS.int(), torch.ones(1, 2))


def test_left_padding_is_taken_off() -> None:
    ids, mask = torch.tensor([[0, 0, 5], [6, 0, 7]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    rows = strip_prompts(ids, mask, 8, 3)
    assert [row.tolist() for row in rows] == [[5], [6, 0, 7]]
    assert {row.dtype for row in rows} == {np.dtype(np.int32)}
    assert [row.tolist() for row in strip_prompts(ids, None, 8, None)] == [[0, 0, 5], [6, 0, 7]]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2, 3]], [[1, 0, 1]], "only left padding"),
        ([[1, 2, 3]], [[1, 1, 0]], "only left padding"),
        ([[1, 2, 3]], [[0, 0, 0]], "zero everywhere"),
        ([[1], [9]], [[1], [1]], "Prompt 1 contains the token id 9; ids must lie in 0..8"),
        ([[-1]], None, "token id -1"),
        ([[1, 2, 3, 4]], None, "Prompt 0 has 4 tokens; the model allows 3"),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused(ids: Any, mask: Any, message: str) -> None:
    given = None if mask is None else torch.tensor(mask)
    with pytest.raises(InvalidInputError, match=message):
        strip_prompts(torch.tensor(ids), given, 9, 3)


@pytest.mark.parametrize(
    ("config", "options", "is_refused"),
    [
        (None, {"max_new_tokens": 0}, True),
        (SimpleNamespace(max_new_tokens=-1), {}, True),
        (SimpleNamespace(max_new_tokens=-1), {"max_new_tokens": 1}, False),
        (None, {}, False),
    ],
)
def test_a_generation_has_a_token(config: Any, options: Any, is_refused: bool) -> None:
    if not is_refused:
        check_new_tokens(config, options)
        return
    with pytest.raises(InvalidInputError, match="at least 1"):
        check_new_tokens(config, options)


@pytest.mark.parametrize(
    "options",
    [
        {"assistant_model": MODEL},
        {"prompt_lookup_num_tokens": 3},
        {"inputs_embeds": IDS},
        {"adapter_names": ["a"]},
        {"cache_implementation": "static"},
    ],
)
def test_options_that_would_be_lost_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedGenerationError, match=next(iter(options))):
        check_options(options)


def test_options_that_change_nothing_pass() -> None:
    check_options({"assistant_model": None, "cache_implementation": "dynamic", "top_k": 3})


def test_best_of_draws_more_than_it_returns() -> None:
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2}
    assert best_of_options(5, MODEL, None, options) == 2
    assert options["num_return_sequences"] == 5
    assert best_of_options(None, MODEL, None, options) is None
    assert options["num_return_sequences"] == 5
    assert best_of_options(3, MODEL, GenerationConfig(do_sample=True), {}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "num_return_sequences": 4}, "at least num_return_sequences, which is 4"),
        ({}, "greedy decoding has one"),
    ],
)
def test_best_of_needs_samples(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        best_of_options(3, MODEL, None, options)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_other_ways_to_decode_are_refused_by_name(changed: dict[str, Any], name: str) -> None:
    config = GenerationConfig()
    for field, value in changed.items():
        setattr(config, field, value)
    with pytest.raises(UnsupportedGenerationError, match=name):
        check_generation(config, [], 1, {})


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "cache_implementation"])
def test_what_the_model_s_own_configuration_says_of_assistants_and_caches_is_left_out(name: str) -> None:
    config, own = GenerationConfig(), GenerationConfig()
    value: Any = "static" if name == "cache_implementation" else 3
    for each in (config, own):
        setattr(each, name, value)
    check_generation(config, [], 1, {}, own)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": torch.ones(1)}, "cannot pass on pixel_values"),
        ({"b": torch.ones(1), "a": "x"}, "cannot pass on a, b"),
        ({"position_ids": torch.tensor([[0, 2]])}, "cannot pass on position_ids"),
        ({"position_ids": torch.tensor([[0, 1, 2]]), "attention_mask": torch.ones(1, 2)}, "position_ids"),
    ],
)
def test_what_would_change_the_output_and_cannot_be_passed_on_is_refused(inputs: Any, message: str) -> None:
    with pytest.raises(UnsupportedGenerationError, match=message):
        check_generation(GenerationConfig(), [], 1, inputs)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"pixel_values": None, "token_type_ids": torch.zeros(0), "labels": []},
        {"position_ids": torch.tensor([[0, 1]])},
        {"position_ids": torch.tensor([[7, 0, 1]]), "attention_mask": torch.tensor([[0, 1, 1]])},
    ],
    ids=["nothing", "empty", "usual positions", "usual positions after padding"],
)
def test_what_changes_nothing_passes(inputs: Any) -> None:
    check_generation(GenerationConfig(), [], 1, inputs)


class Tokenizer:
    bos_token_id, eos_token_id = 1, None

    def __init__(self, size: int = 5, eos: int | None = None) -> None:
        self.size, self.eos_token_id = size, eos

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 96 for letter in text]}


def model_with(eos: Any) -> Any:
    config = SimpleNamespace(bos_token_id=1, eos_token_id=eos, get_text_config=lambda decoder: config)
    return SimpleNamespace(
        config=config, generation_config=SimpleNamespace(bos_token_id=None, eos_token_id=None)
    )


@pytest.mark.parametrize("eos", [2, [2, 3], None])
def test_the_model_s_own_tokenizer_passes(eos: Any) -> None:
    check_tokenizer(Tokenizer(5, 2), model_with(eos), 5)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [(Tokenizer(6), "6 ids, the model's embedding 5"), (Tokenizer(5, 4), "eos_token_id is 4")],
)
def test_another_model_s_tokenizer_is_refused(tokenizer: Any, message: str) -> None:
    with pytest.raises(TokenizerMismatchError, match=message):
        check_tokenizer(tokenizer, model_with([2, 3]), 5)


@pytest.mark.parametrize(
    ("texts", "ids"),
    [
        (None, []),
        ("ab", [[1, 2]]),
        (["ab", "c"], [[1, 2], [3]]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (torch.tensor([[1, 2]]), [[1, 2]]),
        (np.array([4]), [[4]]),
        ([np.array([1]), torch.tensor([2]), "", []], [[1], [2]]),
        ([], []),
    ],
)
def test_references_are_text_ids_or_lists_of_them(texts: Any, ids: list[list[int]]) -> None:
    found = reference_tokens(texts, Tokenizer(), 5)
    assert [each.tolist() for each in found] == ids
    assert all(each.dtype == np.int32 for each in found)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (5, "is a int"),
        ([[5]], "outside the token ids 0..4"),
        ([-1], "outside"),
        ([[0.5]], "outside"),
        ([[True]], "outside"),
    ],
)
def test_other_references_are_refused(texts: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        reference_tokens(texts, Tokenizer(), 5)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(InvalidInputError, match="need a tokenizer"):
        reference_tokens("ab", None, 5)
