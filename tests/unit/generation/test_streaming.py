"""Streamers of one row or several, and what needs a tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from retrieval_draft.errors import InvalidInputError, UnsupportedGenerationError
from retrieval_draft.generation.streaming import (
    ShownPrompt,
    StreamRows,
    effective,
    ending,
    heal_tokens,
    shown_streamer,
    stream_rows,
    take_stop_strings,
)
from tests.support.models import make
from tests.support.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
MODEL = make("llama", vocab_size=len(TOKENIZER))


class Streamer:
    def __init__(self) -> None:
        self.got: list[Any] = []
        self.ends = 0

    def put(self, tokens: torch.Tensor) -> None:
        self.got.append(tokens.tolist())

    def end(self) -> None:
        self.ends += 1


def test_one_row_s_tokens_go_on_at_once() -> None:
    streamer = Streamer()
    rows = StreamRows(streamer, 1, 0)
    take = rows.taker(0)
    take(5)
    take(6)
    rows.end(0)
    assert streamer.got == [[5], [6]]


def test_of_several_a_position_goes_on_when_every_row_has_it_or_has_ended() -> None:
    streamer = Streamer()
    rows = StreamRows(streamer, 3, 9)
    first, second, third = (rows.taker(row) for row in range(3))
    first(1)
    first(2)
    second(11)
    assert streamer.got == []
    third(21)
    assert streamer.got == [[1, 11, 21]]
    rows.end(2)
    assert streamer.got == [[1, 11, 21]], "the second has no next one yet"
    second(12)
    assert streamer.got[1:] == [[2, 12, 9]]
    rows.end(0)
    second(13)
    second(14)
    rows.end(1)
    assert streamer.got[2:] == [[9, 13, 9], [9, 14, 9]]


def test_the_last_row_to_end_lets_go_of_what_waited_for_it() -> None:
    streamer = Streamer()
    rows = StreamRows(streamer, 2, 9)
    take = rows.taker(0)
    take(1)
    take(2)
    rows.end(0)
    assert streamer.got == []
    rows.end(1)
    assert streamer.got == [[1, 9], [2, 9]]


def test_a_prompt_that_was_shown_already_is_not_shown_again() -> None:
    streamer = Streamer()
    shown = ShownPrompt(streamer)
    shown.put(torch.tensor([[1, 2]]))
    shown.put(torch.tensor([3]))
    shown.end()
    assert (streamer.got, streamer.ends) == ([[3]], 1)
    assert shown_streamer() is None
    assert shown_streamer(streamer) is not None


def test_a_streamer_is_shown_the_prompt_first() -> None:
    streamer, config = Streamer(), GenerationConfig()
    config._pad_token_tensor = torch.tensor(7)
    rows = stream_rows(streamer, torch.tensor([[1, 2], [3, 4]]), config)
    assert rows is not None
    rows.end(1)
    rows.taker(0)(5)
    assert streamer.got == [[[1, 2], [3, 4]], [5, 7]]
    assert stream_rows(None, torch.tensor([[1]]), config) is None


def test_a_streamer_ends_whatever_happens() -> None:
    streamer = Streamer()
    with ending(streamer):
        assert streamer.ends == 0
    with pytest.raises(KeyError), ending(streamer):
        raise KeyError
    with ending(None):
        pass
    assert streamer.ends == 2


def test_an_argument_goes_before_the_caller_s_configuration_and_that_before_the_model_s() -> None:
    model = make("llama")
    model.generation_config.top_k = 3
    config = GenerationConfig(top_k=4)
    assert effective(model, config, {"top_k": 5}, "top_k") == 5
    assert effective(model, config, {"top_k": None}, "top_k") is None
    assert effective(model, config, {}, "top_k") == 4
    assert effective(model, None, {}, "top_k") == 3
    assert effective(model, None, {}, "no such option") is None


@pytest.mark.parametrize("where", ["argument", "configuration", "model"])
def test_stop_strings_become_a_criterion_wherever_they_stand(where: str) -> None:
    model = make("llama", vocab_size=len(TOKENIZER))
    own: Any = object()
    options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([own])}
    config = GenerationConfig(stop_strings=["ab"]) if where == "configuration" else None
    if where == "argument":
        options["stop_strings"] = ["ab"]
    if where == "model":
        model.generation_config.stop_strings = ["ab"]
    left = take_stop_strings(model, config, options, TOKENIZER)
    first, second = options["stopping_criteria"]
    assert first is own
    assert isinstance(second, StopStringCriteria)
    assert second.stop_strings == ("ab",)
    assert options.get("stop_strings") is None
    assert left is None or left.stop_strings is None
    assert config is None or config.stop_strings == ["ab"], "the caller's own stays as it is"
    assert ("stop_strings" in options) == (where == "model"), "undone by an argument"


def test_without_stop_strings_nothing_changes_and_with_them_a_tokenizer_is_needed() -> None:
    options: dict[str, Any] = {}
    assert take_stop_strings(MODEL, None, options, None) is None
    assert options == {}
    with pytest.raises(InvalidInputError, match="stop_strings need a tokenizer"):
        take_stop_strings(MODEL, None, {"stop_strings": "x"}, None)


def test_tokens_are_healed_only_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, healed = torch.tensor([[1, 2]]), torch.tensor([[1, 3]])
    monkeypatch.setattr(type(MODEL), "heal_tokens", lambda model, given, tokenizer: healed)
    assert heal_tokens(MODEL, ids, None, {}, None) == (ids, None)
    options: dict[str, Any] = {"token_healing": True}
    found, _ = heal_tokens(MODEL, ids, None, options, TOKENIZER)
    assert found is healed
    assert options == {}
    with pytest.raises(InvalidInputError, match="token_healing needs a tokenizer"):
        heal_tokens(MODEL, ids, None, {"token_healing": True}, None)


def test_healing_that_changes_the_length_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(MODEL), "heal_tokens", lambda model, given, tokenizer: given[:, 1:])
    with pytest.raises(UnsupportedGenerationError, match=r"shape \(1, 2\), the tokenizer makes \(1, 1\)"):
        heal_tokens(MODEL, torch.tensor([[1, 2]]), None, {"token_healing": True}, TOKENIZER)
