"""The draft model for llama-cpp-python, driven as its generate loop drives one."""

from __future__ import annotations

import sys
from abc import ABC
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from retrieval_draft.errors import InvalidInputError, UnsupportedModelError
from retrieval_draft.integrations.llama_cpp import RetrievalDraftModel
from retrieval_draft.integrations.llama_cpp.pass_costs import PassCosts
from retrieval_draft.proposer import Proposer

VOCABULARY = 30


class Engine:
    """llama-cpp-python's loop with a draft model, over a function that returns the next token.

    The text lies in one buffer that is written over, drafts included, as there.
    """

    def __init__(self, next_token: Callable[[list[int]], int], draft_model: Any = None) -> None:
        self._next, self._draft_model = next_token, draft_model
        self._buffer = np.zeros(512, np.intc)
        self.passes: list[int] = []

    def generate(self, prompt: list[int], new: int) -> list[int]:
        emitted: list[int] = []
        known, tokens = 0, list(prompt)
        at = len(prompt) - 1
        while True:
            if known:
                self.passes.append(len(tokens))  # the prompt's own does not count
            self._buffer[known : known + len(tokens)] = tokens
            known += len(tokens)
            while at < known:
                token = self._next(self._buffer[: at + 1].tolist())
                at += 1
                emitted.append(token)
                if len(emitted) == new:
                    return emitted
                tokens = [token]
                if at < known and token != self._buffer[at]:
                    known = at
                    break
            self._buffer[known : known + 1] = tokens
            if self._draft_model is not None:
                drafted = self._draft_model(self._buffer[: known + 1])
                assert drafted.dtype == np.intc
                tokens.extend(drafted.astype(int)[: len(self._buffer) - known - 1])


def circle(text: list[int]) -> int:
    """A text of period 7, with an exception now and then."""
    return 29 if len(text) % 23 == 0 else len(text) % 7


def made(**options: Any) -> RetrievalDraftModel:
    return RetrievalDraftModel(Proposer.for_tokenizer(None, vocabulary=VOCABULARY), **options)


@pytest.mark.parametrize("options", [{"num_pred_tokens": 6}, {"num_pred_tokens": 0}, {"max_tokens": 9}, {}])
def test_the_engine_says_the_same_in_fewer_passes(options: dict[str, int]) -> None:
    plain = Engine(circle)
    with made(**options) as drafts:
        drafted = Engine(circle, drafts)
        for prompt in ([1, 2, 3], [4], [1, 2, 3], list(range(20))):
            assert drafted.generate(prompt, 60) == plain.generate(prompt, 60)
        drafts.finish()
        assert drafts.stats.requests == 4
        if options == {"num_pred_tokens": 0}:
            assert len(drafted.passes) == len(plain.passes)
            assert drafts.stats.drafted == 0
        else:
            assert len(drafted.passes) < 0.7 * len(plain.passes)
            # The last pass of a request is not seen.
            assert 0.6 * 4 * 60 < drafts.stats.tokens + drafts.stats.requests <= 4 * 60
        assert max(drafted.passes) <= 1 + options.get("num_pred_tokens", options.get("max_tokens", 32))


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.intc)


def test_a_text_that_goes_on_by_what_was_drafted_is_the_same_request() -> None:
    with made(num_pred_tokens=2) as drafts:
        assert drafts(ids(1, 2, 3, 1, 2)).tolist() == [3, 1]
        drafts(ids(1, 2, 3, 1, 2, 3, 1, 9))  # both taken, and one
        drafts.finish()
        assert (drafts.stats.requests, drafts.stats.tokens, drafts.stats.accepted) == (1, 3, 2)


@pytest.mark.parametrize(
    "text",
    [
        (1, 2, 3, 1, 2),  # the same again
        (1, 2, 3),  # taken back
        (1, 2, 9, 1, 2, 3),  # another beginning
        (1, 2, 3, 1, 2, 3, 1, 9, 9),  # more than one pass can have said: the next turn
        (8,),
    ],
)
def test_any_other_text_is_another_request(text: tuple[int, ...]) -> None:
    with made(num_pred_tokens=2) as drafts:
        drafts(ids(1, 2, 3, 1, 2))
        drafts(ids(*text))
        drafts.finish()
        assert (drafts.stats.requests, drafts.stats.accepted) == (2, 0)


def test_what_a_request_said_is_drafted_in_the_next() -> None:
    with made(num_pred_tokens=3) as drafts:
        drafts(ids(1, 2))
        for end in range(3, 7):
            drafts(ids(*range(1, end)))
        drafts.flush()
        assert drafts(ids(20, 2, 3)).tolist()[:2] == [4, 5]


def test_the_callers_buffer_may_change() -> None:
    with made(num_pred_tokens=2) as drafts:
        buffer = ids(1, 2, 3, 1, 2, 0)
        drafts(buffer[:5])
        buffer[:] = 7
        drafts(ids(1, 2, 3, 1, 2, 3))
        drafts.finish()
        assert drafts.stats.requests == 1


@pytest.mark.parametrize("options", [{"max_tokens": -1}, {"num_pred_tokens": 5000}])
def test_lengths_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="must lie in"):
        made(**options)


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InvalidInputError, match=r"retrieval_draft\[llama\]"):
        RetrievalDraftModel.for_gguf("model.gguf")


def test_dear_passes_make_drafts_short_and_cheap_ones_long() -> None:
    probs = 0.8 ** np.arange(1, 31, dtype=np.float32)
    lengths = {}
    for name, slope in (("dear", 0.9), ("cheap", 0.01)):
        costs = PassCosts()
        assert 0 < costs.choose(probs, 100) <= 8
        for turn in range(60):
            tokens = (1, 2, 4, 8, 16)[turn % 5]
            costs.choose(probs, 100)  # a trial, where one is due, is over after the next pass
            costs.observe(tokens, 1, 100, 0.05 * (1 + slope * (tokens - 1)))
        lengths[name] = costs.choose(probs, 100)
    assert lengths["dear"] <= 3 < 6 < lengths["cheap"]


def test_nothing_likely_is_not_worth_a_first_draft() -> None:
    assert PassCosts().choose(np.full(5, 0.05, np.float32), 10) == 0
    assert PassCosts().choose(np.empty(0, np.float32), 10) == 0


def test_passes_are_timed_on_the_engine() -> None:
    class Llama:
        def __init__(self) -> None:
            self.evaluated: list[int] = []
            self.resets = 0

        def token_bos(self) -> int:
            return -1

        def reset(self) -> None:
            self.resets += 1

        def eval(self, tokens: list[int]) -> None:
            self.evaluated.append(len(tokens))

    llama = Llama()
    with made() as drafts:
        drafts.warm_up(llama)
        assert drafts.costs.is_timed
        assert sorted(drafts.costs.seconds_by_size()) == [1, 2, 4, 8, 16, 32, 64]
    assert llama.resets == len(llama.evaluated) + 1


def test_no_text_has_no_drafts() -> None:
    with made(num_pred_tokens=4) as drafts:
        assert drafts(np.array([], np.intc)).tolist() == []


@pytest.mark.parametrize(
    "text",
    [
        [1, -1, -1, 2, 3],  # placeholders of an image
        [1, 2, VOCABULARY, 1, 2],
        [2**31 - 1],
        [-(2**31)],
    ],
)
def test_a_text_of_other_ids_is_not_drafted_for(text: list[int]) -> None:
    with made(num_pred_tokens=4) as drafts:
        request = [1, 2, 3, 4, 1, 2]
        assert drafts(np.array(request, np.intc)).tolist() == [3, 4, 1, 2]
        assert drafts(np.array(text, np.intc)).tolist() == []
        assert drafts(np.array([*text, 1], np.intc)).tolist() == []
        assert drafts(np.array(request, np.intc)).tolist()[:2] == [3, 4]
        assert drafts.failures == 0


def test_a_request_that_comes_to_hold_other_ids(caplog) -> None:
    with made(num_pred_tokens=4) as drafts:
        drafts(np.array([1, 2, 3, 1, 2], np.intc))
        assert drafts(np.array([1, 2, 3, 1, 2, 99], np.intc)).tolist() == []
        assert drafts(np.array([1, 2, 3, 1, 2, 99, 1, 2], np.intc)).tolist() == []
    assert not caplog.records


def test_drafts_that_fail_cost_no_reply(monkeypatch, caplog) -> None:
    plain = Engine(circle)
    drafts = made()
    monkeypatch.setattr(drafts.proposer, "open", lambda *given, **named: 1 / 0)
    assert Engine(circle, drafts).generate([1, 2, 3], 20) == plain.generate([1, 2, 3], 20)
    assert drafts.failures == 19
    assert len(caplog.records) == 1
    monkeypatch.undo()
    assert Engine(circle, drafts).generate([1, 2, 3], 60) == plain.generate([1, 2, 3], 60)
    drafts.close()


@pytest.mark.parametrize(
    ("functions", "is_refused"),
    [
        ({}, False),  # an older llama-cpp-python
        ({"llama_model_is_recurrent": False, "llama_model_is_hybrid": False}, False),
        ({"llama_model_is_recurrent": True, "llama_model_is_hybrid": False}, True),
        ({"llama_model_is_recurrent": False, "llama_model_is_hybrid": True}, True),
    ],
)
def test_a_file_of_a_recurrent_model_is_refused(
    functions: dict[str, bool], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = SimpleNamespace(model="the model", n_vocab=lambda: VOCABULARY)
    engine = SimpleNamespace(
        Llama=lambda *_, **__: llama,
        LLAMA_TOKEN_ATTR_UNUSED=1,
        llama_model_get_vocab=lambda model: model,
        llama_vocab_type=lambda _: 0,
        llama_vocab_get_text=lambda _, number: f"token {number}".encode(),
        llama_vocab_get_attr=lambda *_: 0,
        llama_speculative=SimpleNamespace(LlamaDraftModel=ABC),
        **{name: lambda model, answer=answer: answer for name, answer in functions.items()},
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", engine)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if is_refused:
        with pytest.raises(UnsupportedModelError, match="recurrent state"):
            RetrievalDraftModel.for_gguf("model.gguf")
    else:
        RetrievalDraftModel.for_gguf("model.gguf").close()
