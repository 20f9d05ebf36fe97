"""A call in every shape that model.generate takes: equal to it, or refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, MaxLengthCriteria

from retrieval_draft import DraftConfig, RetrievalDrafter
from retrieval_draft.errors import InvalidInputError, RetrievalDraftError
from tests.support.drafters import prompt_ids
from tests.support.models import make
from tests.support.tiny import TEXT, byte_tokenizer

TOKENIZER = byte_tokenizer()
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
CONFIG = GenerationConfig(**OPTIONS)


TOKENIZER.pad_token = "</s>"


def with_text() -> tuple[Any, RetrievalDrafter, torch.Tensor]:
    model = make("llama", vocab_size=len(TOKENIZER))
    ids = TOKENIZER(TEXT, return_tensors="pt").input_ids
    return model, RetrievalDrafter.for_model(model, TOKENIZER), ids


class Raises(LogitsProcessor):
    """Prefers a token by the length of the text."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + 9.0 * (torch.arange(scores.shape[1]) % 7 == input_ids.shape[1] % 7)


class Reader:
    """A streamer that counts its ends."""

    def __init__(self) -> None:
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        self.ends += 1


PROMPT = prompt_ids()
PROCESSORS = LogitsProcessorList([Raises()])
SHAPES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((PROMPT, CONFIG), {}),
    ((PROMPT, CONFIG), {"attention_mask": torch.ones_like(PROMPT)}),
    ((PROMPT, CONFIG, PROCESSORS), {}),
    ((PROMPT, CONFIG, PROCESSORS, [MaxLengthCriteria(29)]), {}),
    ((PROMPT, None, PROCESSORS), OPTIONS),
    ((), {"inputs": PROMPT, "attention_mask": torch.ones_like(PROMPT), **OPTIONS}),
    ((), {"input_ids": PROMPT, "generation_config": CONFIG}),
    ((), {"bos_token_id": 5, **OPTIONS}),
    ((None, GenerationConfig(bos_token_id=5, **OPTIONS)), {}),
]


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_arguments_mean_what_they_mean_to_model_generate(shape: int) -> None:
    model = make("llama")
    given, named = SHAPES[shape]
    expected = model.generate(*given, **named)
    found = RetrievalDrafter.for_model(model).generate(*given, **named)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("given", "named", "message"),
    [
        ((PROMPT,), {"inputs": PROMPT}, "both given"),
        ((PROMPT, CONFIG, CONFIG), {}, "logits_processor is a GenerationConfig"),
        ((PROMPT, CONFIG), {"generation_config": CONFIG}, "given twice"),
        ((PROMPT, CONFIG, PROCESSORS), {"logits_processor": PROCESSORS}, "given twice"),
        ((PROMPT, [[1]]), {}, "attention_mask is a list"),
        ((PROMPT, None, {"max_new_tokens": 3}), {}, "generation_config is a dict"),
        ((), {}, "no bos token"),
        ((PROMPT,), {"adapter_names": ["one"]}, "adapter_names"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(given: Any, named: Any, message: str) -> None:
    with pytest.raises(RetrievalDraftError, match=message):
        RetrievalDrafter.for_model(make("llama")).generate(*given, **named)


@pytest.mark.parametrize("rows", [1, 2])
def test_int32_prompts_come_back_as_int64(rows: int) -> None:
    model = make("llama")
    prompt = torch.cat([PROMPT, PROMPT.roll(5, 1)])[:rows]
    expected = model.generate(prompt.int(), **OPTIONS, pad_token_id=0)
    drafter = RetrievalDrafter.for_model(model)
    for found in (
        drafter.generate(prompt.int(), **OPTIONS, pad_token_id=0),
        model.generate(prompt.int(), **OPTIONS, pad_token_id=0, custom_generate=drafter),
        drafter.generate(prompt.int(), **OPTIONS, pad_token_id=0, return_dict_in_generate=True).sequences,
    ):
        assert found.dtype == expected.dtype == torch.int64
        assert torch.equal(found, expected)


def test_stop_strings_of_the_models_own_configuration_stop() -> None:
    model, drafter, ids = with_text()
    plain = model.generate(ids, **OPTIONS)[0, ids.shape[1] :]
    texts = [TOKENIZER.decode(token) for token in plain[3:]]
    model.generation_config.stop_strings = [next(text for text in texts if text.isascii())]
    expected = model.generate(ids, tokenizer=TOKENIZER, **OPTIONS)
    assert expected.shape[1] < ids.shape[1] + 12
    assert torch.equal(drafter.generate(ids, **OPTIONS), expected)
    assert torch.equal(drafter.generate(ids, tokenizer=TOKENIZER, **OPTIONS), expected)
    # The caller's option goes first.
    assert torch.equal(
        drafter.generate(ids, **OPTIONS, stop_strings=None), model.generate(ids, **OPTIONS, stop_strings=None)
    )
    with pytest.raises(InvalidInputError, match="tokenizer"):
        RetrievalDrafter.for_model(model).generate(ids, **OPTIONS)


def test_token_healing_heals_as_the_model_does() -> None:
    model, drafter, ids = with_text()
    expected = model.generate(ids, token_healing=True, tokenizer=TOKENIZER, **OPTIONS)
    assert torch.equal(drafter.generate(ids, token_healing=True, **OPTIONS), expected)
    healing = GenerationConfig(token_healing=True, **OPTIONS)
    assert torch.equal(drafter.generate(ids, healing), expected)
    assert healing.token_healing
    with pytest.raises(InvalidInputError, match="tokenizer"):
        RetrievalDrafter.for_model(model).generate(ids, token_healing=True)


@pytest.mark.parametrize(
    "refused",
    [
        {"num_beams": 2},
        {"repetition_penalty": 0.0},
        {"share": "all"},
        {"documents": ["text without a tokenizer"]},
        {"inputs": PROMPT},
        {"max_new_tokens": 0},
        {"best_of": 1, "num_return_sequences": 2},
    ],
)
def test_a_streamer_ends_once_when_its_call_is_refused(refused: dict[str, Any]) -> None:
    drafter, reader = RetrievalDrafter.for_model(make("llama")), Reader()
    with pytest.raises(ValueError, match=next(iter(refused)).rpartition("_")[2]):
        drafter.generate(PROMPT, streamer=reader, **{**OPTIONS, **refused})
    assert reader.ends == 1


def test_a_streamer_ends_once_after_a_call_by_position_and_in_a_custom_loop() -> None:
    model = make("llama")
    drafter, reader = RetrievalDrafter.for_model(model), Reader()
    drafter.generate(PROMPT, CONFIG, None, None, None, None, None, reader)
    assert reader.ends == 1
    for named in ({"draft_share": "all"}, {"draft_documents": ["text"]}):
        reader = Reader()
        with pytest.raises(RetrievalDraftError):
            model.generate(PROMPT, **OPTIONS, streamer=reader, custom_generate=drafter, **named)
        assert reader.ends == 1
    reader = Reader()
    with pytest.raises(InvalidInputError, match="streamer"):
        drafter.continuous.prepare(PROMPT, streamer=reader)
    assert reader.ends == 1


def test_a_prepared_request_takes_a_configuration() -> None:
    model = make("llama")
    drafter = RetrievalDrafter.for_model(model)
    prepared = drafter.continuous.prepare(PROMPT, generation_config=CONFIG)
    assert prepared.requests[0].max_length == PROMPT.shape[1] + 12


def test_prompts_are_stripped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval_draft import drafter as module

    calls = []
    strip = module.strip_prompts
    monkeypatch.setattr(module, "strip_prompts", lambda *given: calls.append(1) or strip(*given))
    RetrievalDrafter.for_model(make("llama")).generate(PROMPT, **OPTIONS)
    assert len(calls) == 1


def test_a_method_that_contradicts_the_configuration_is_an_error() -> None:
    model = make("llama")
    for method in ("calibrated", "none"):
        with pytest.raises(InvalidInputError, match=r"config\.method 'rest'"):
            RetrievalDrafter.for_model(model, method=method, config=DraftConfig(method="rest"))
    assert RetrievalDrafter.for_model(model, config=DraftConfig(method="rest")).config.method == "rest"
    assert RetrievalDrafter.for_model(model, method="rest").config.method == "rest"
