"""Fields under vLLM's names do what they do there, and drafted replies are those without drafts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.support.servers import MODEL, Running, serving, tiny_drafter, tiny_model, tiny_tokenizer

OFF = {"speculative": {"enabled": False}}
PROMPT = "ab cd ab cd ab cd ab"
SPECIAL = "<|mark|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [SPECIAL]})
    return made


@pytest.fixture(scope="module")
def running(tokenizer: Any) -> Iterator[Running]:
    with serving(tiny_drafter(tiny_model(tokenizer, eos_token_id=0), tokenizer), tokenizer) as made:
        yield made


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "metrics": True, **fields}  # fmt: skip


def ask(running: Running, path: str = "completions", **fields: Any) -> Any:
    response = httpx.post(f"{running.url}/v1/{path}", json=body(**fields), timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def choice(running: Running, **fields: Any) -> Any:
    return ask(running, **fields)["choices"][0]


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.3, "seed": 3}], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bad_words": ["cd", "a b"]},
        {"stop_token_ids": [4], "min_tokens": 6},
        {"stop": ["a"], "min_tokens": 9},
        {"allowed_token_ids": [3, 4, 5, 6]},
        {"logit_bias": {"3": 5, "4": -100}},
        {"skip_special_tokens": False, "logit_bias": {"15": 6}},
        {"stop": ["b"], "include_stop_str_in_output": True},
        {"speculative": {"max_draft_tokens": 2}, "frequency_penalty": 0.2},
        {"prediction": {"type": "content", "content": "ab ab cd"}, "presence_penalty": 0.5},
        {"n": 2},
    ],
    ids=str,
)
def test_drafted_equals_undrafted(running: Running, fields: dict[str, Any], sampled: dict[str, Any]) -> None:
    drafted = ask(running, **fields, **sampled)
    plain = ask(running, **{**fields, **OFF}, **sampled)
    assert drafted["choices"] == plain["choices"]
    assert plain["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0


def test_drafts_are_limited(running: Running) -> None:
    def metrics(**fields: Any) -> Any:
        return ask(running, max_tokens=60, **fields)["metrics"]["speculative_decoding"]

    free, one = metrics(), metrics(speculative={"max_draft_tokens": 1})
    assert free["num_draft_tokens"] > free["num_spec_steps"]
    assert 0 < one["num_draft_tokens"] <= one["num_spec_steps"]
    assert metrics(speculative={"enabled": True, "max_draft_tokens": 0})["num_draft_tokens"] == 0


def test_a_token_that_stops_is_no_text(running: Running, tokenizer: Any) -> None:
    whole = choice(running)
    stop = whole["token_ids"][5]
    begin = whole["token_ids"].index(stop)
    cut = choice(running, stop_token_ids=[stop])
    assert (cut["finish_reason"], cut["token_ids"]) == ("stop", whole["token_ids"][: begin + 1])
    assert cut["text"] == tokenizer.decode(whole["token_ids"][:begin], skip_special_tokens=True)
    kept = choice(running, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert kept["text"] == tokenizer.decode(whole["token_ids"][: begin + 1], skip_special_tokens=True)
    later = choice(running, stop_token_ids=[stop], min_tokens=12)
    assert stop not in later["token_ids"][:11]
    assert len(later["token_ids"]) >= 12


def test_stop_strings_count_after_the_least_tokens(running: Running) -> None:
    whole = choice(running)
    stop = whole["text"][:1]
    assert choice(running, stop=stop)["text"] == ""
    cut = choice(running, stop=stop, min_tokens=4)
    assert whole["text"].startswith(cut["text"])
    assert len(cut["token_ids"]) >= 4


def test_bad_words_are_not_said(running: Running, tokenizer: Any) -> None:
    ids = choice(running)["token_ids"]
    word = tokenizer.decode(ids[3:4])
    assert ids[3] not in choice(running, bad_words=[word])["token_ids"]
    ids = choice(running, logit_bias={"1": -100, "2": 8, "3": 8})["token_ids"]
    pairs = [pair for pair in pairwise(ids) if tokenizer(tokenizer.decode(pair))["input_ids"] == list(pair)]
    bad = [tokenizer.decode(pair) for pair in pairs]
    said = choice(running, logit_bias={"1": -100, "2": 8, "3": 8}, bad_words=bad)["token_ids"]
    assert pairs
    assert not {*pairwise(said)} & {*pairs}


def test_special_tokens_are_shown_on_demand(running: Running, tokenizer: Any) -> None:
    token = tokenizer.convert_tokens_to_ids(SPECIAL)
    fields = {"logit_bias": {str(token): 100}, "max_tokens": 2}
    assert choice(running, **fields)["text"] == ""
    assert choice(running, skip_special_tokens=False, **fields)["text"] == 2 * SPECIAL
    ended = {"logit_bias": {"0": 100}, "ignore_eos": False, "skip_special_tokens": False}
    assert choice(running, **ended)["text"] == ""  # the end is no part of it
    assert choice(running, **ended, include_stop_str_in_output=True)["text"] == "<eos>"
    stopped = choice(running, skip_special_tokens=False, stop=[2 * SPECIAL], **{**fields, "max_tokens": 8})
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")


def chat(running: Running, *turns: tuple[str, str], **fields: Any) -> Any:
    messages = [{"role": role, "content": content} for role, content in turns]
    response = httpx.post(
        f"{running.url}/v1/chat/completions",
        json={"messages": messages, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields},
        timeout=60,
    )
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def test_a_chat_echoes_the_message_it_continues(running: Running) -> None:
    turns = (("user", "ab"), ("assistant", "cd"))
    fields = {"continue_final_message": True}
    plain = chat(running, *turns, **fields)[0]["message"]["content"]
    assert chat(running, *turns, **fields, echo=True)[0]["message"]["content"] == "cd" + plain
    assert chat(running, ("user", "ab"), echo=True)[0] == chat(running, ("user", "ab"))[0]


def test_the_best_of_a_chat(running: Running) -> None:
    fields = {"temperature": 1, "seed": 5}
    best = chat(running, ("user", "ab cd"), **fields, best_of=4)
    assert len(best) == 1
    assert best[0]["message"] in [each["message"] for each in chat(running, ("user", "ab cd"), **fields, n=4)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"speculative": {"enabled": 1}}, "speculative"),
        ({"speculative": {"max_draft_tokens": -1}}, "speculative"),
        ({"speculative": {"method": "ngram"}}, "speculative"),
        ({"stop_token_ids": [1 << 20]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["a"] * 65}, "bad_words"),
        ({"best_of": 2, "n": 3}, "best_of"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_wrong_values_are_refused_by_name(
    running: Running, path: str, fields: dict[str, Any], param: str
) -> None:
    start: dict[str, Any] = {"prompt": "ab"} if path == "completions" else {"messages": [{"role": "user"}]}
    response = httpx.post(f"{running.url}/v1/{path}", json={**start, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
