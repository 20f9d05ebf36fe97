"""Fields of requests do what they say: roles, stops, offsets, log probabilities, the template, CORS."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.server.openai.model_defaults import usable_defaults
from retrieval_draft.server.settings import ServerSettings
from tests.support.servers import MODEL, Running, serving, tiny_drafter, tiny_model, tiny_tokenizer

STRICT = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{{ messages[0]['content'] }}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }} {% endfor %}"
    "{% if calm is defined and calm %}ef {% endif %}{% if add_generation_prompt %}gh{% endif %}"
)
PAGE = "https://pages.example"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tiny_tokenizer(STRICT)
    made.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return made


@pytest.fixture(scope="module")
def running(tokenizer: Any) -> Iterator[Running]:
    drafter = tiny_drafter(tiny_model(tokenizer), tokenizer)
    with serving(drafter, tokenizer, keys={"a-long-key": "a"}, cors_origins=(PAGE,)) as made:
        yield made


def ask(running: Running, path: str = "completions", **body: Any) -> Any:
    if path == "completions":
        body = {"prompt": "ab cd", **body}
    response = httpx.post(
        f"{running.url}/v1/{path}", json={"model": MODEL, "max_tokens": 6, "temperature": 0, **body},
        headers={"Authorization": "Bearer a-long-key"}, timeout=60,
    )  # fmt: skip
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def chat(running: Running, *turns: tuple[str, str], **body: Any) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(ask(running, "chat/completions", messages=messages, **body)["message"]["content"])


def refused(running: Running, **body: Any) -> str:
    body = {"messages": [{"role": "user", "content": "ab"}], **body}
    response = httpx.post(
        f"{running.url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer a-long-key"}
    )
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


def test_a_developer_is_a_system_where_the_template_knows_no_other(running: Running) -> None:
    as_system = chat(running, ("system", "ab"), ("user", "cd"))
    assert chat(running, ("developer", "ab"), ("user", "cd")) == as_system


def test_variables_of_the_template_are_no_arguments(running: Running) -> None:
    assert chat(running, ("user", "ab"), chat_template_kwargs={"calm": True}) != ""
    for name in ("chat_template", "tokenize", "messages", "tokenizer_kwargs", "padding", "unheard_of"):
        assert "chat_template_kwargs" in refused(running, chat_template_kwargs={name: True})


def test_options_of_transformers_stand_for_absent_fields(running: Running) -> None:
    body = {"messages": [{"role": "user", "content": "ab cd"}], "max_tokens": None, "temperature": None}
    config = '{"do_sample": false, "max_new_tokens": 3, "transformers_version": "5.0.0"}'

    def reply(**more: Any) -> Any:
        return ask(running, "chat/completions", **{**body, "return_token_ids": True, **more})["token_ids"]

    greedy = reply(max_tokens=3, temperature=0)
    assert reply(generation_config=config) == greedy
    assert reply(generation_config={"do_sample": False}, max_tokens=3) == greedy
    sampled = {"temperature": 1.5, "top_k": 5, "seed": 3, "max_tokens": 8}
    options = {name: sampled[name] for name in ("temperature", "top_k")}
    assert reply(generation_config=options, seed=3, max_tokens=8) == reply(**sampled)
    assert reply(generation_config={"do_sample": False}, **sampled) == reply(**sampled)
    for wrong in ('{"num_beams": 4}', {"num_beams": 4}, "no JSON", 3, {"top_p": 2}):
        assert "generation_config" in refused(running, generation_config=wrong)
    assert "`num_beams`" in refused(running, generation_config={"num_beams": 4})


def test_a_model_that_is_to_be_loaded_is(running: Running) -> None:
    key = {"Authorization": "Bearer a-long-key"}
    told = httpx.post(f"{running.url}/load_model", json={"model": MODEL}, headers=key)
    assert (told.status_code, told.headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    assert told.text == f'data: {{"status":"ready","model":"{MODEL}","cached":true}}\n\n'
    assert httpx.post(f"{running.url}/load_model", json={"model": "b"}, headers=key).status_code == 404
    assert httpx.post(f"{running.url}/load_model", json={"model": MODEL}).status_code == 401


def test_a_reply_may_go_on_with_the_last_message(running: Running) -> None:
    assert "continue_final_message" in refused(
        running, continue_final_message=True, add_generation_prompt=True
    )
    assert chat(running, ("user", "ab cd"), add_generation_prompt=False) is not None


@pytest.mark.parametrize("stream", [False, True])
def test_a_special_token_stops_and_is_not_shown(running: Running, tokenizer: Any, stream: bool) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    body = {"logit_bias": {str(end): 100}, "return_token_ids": True, "ignore_eos": True}
    choice = ask(running, stop=["<|end|>"], **body)
    assert (choice["finish_reason"], choice["token_ids"], choice["text"]) == ("stop", [end], "")
    twice = ask(running, stop=["<|end|><|end|>"], **body)
    assert (twice["finish_reason"], twice["token_ids"]) == ("stop", [end, end])
    other = ask(running, stop=["<|end"], **body)
    assert other["finish_reason"] == "length"  # it is no text


def test_a_stop_string_may_be_kept(running: Running) -> None:
    text = ask(running, max_tokens=12, ignore_eos=True)["text"]
    stop = text[3:5]
    cut = ask(running, max_tokens=12, ignore_eos=True, stop=stop)
    kept = ask(running, max_tokens=12, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    position = text.index(stop)
    assert (cut["text"], kept["text"]) == (text[:position], text[: position + len(stop)])


def test_only_allowed_tokens_are_said(running: Running) -> None:
    ids = ask(running, allowed_token_ids=[3, 5], return_token_ids=True, ignore_eos=True)["token_ids"]
    assert set(ids) <= {3, 5}


def test_a_reply_has_its_least_tokens(running: Running, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    if eos is None:
        pytest.skip("this tokenizer has no end")
    ids = ask(running, min_tokens=4, logit_bias={str(eos): 50}, return_token_ids=True)["token_ids"]
    assert len(ids) >= 4


@pytest.mark.parametrize("stop", [None, "zz"])
def test_offsets_lie_in_the_text(running: Running, stop: str | None) -> None:
    choice = ask(running, echo=True, logprobs=1, ignore_eos=True, stop=stop)
    text, logprobs = choice["text"], choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset : offset + len(token)] == token


def test_pages_of_named_origins_may_use_the_server(running: Running) -> None:
    asked = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    response = httpx.options(f"{running.url}/v1/completions", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == PAGE
    assert (
        "access-control-allow-origin"
        not in httpx.options(
            f"{running.url}/v1/completions", headers={**asked, "Origin": "https://other.example"}
        ).headers
    )
    without_key = httpx.get(f"{running.url}/v1/models", headers={"Origin": PAGE})
    assert without_key.status_code == 401
    assert without_key.headers["access-control-allow-origin"] == PAGE
    for wrong in ("pages.example", "https://a/b", "https://*.example", ""):
        with pytest.raises(InvalidInputError, match="origin"):
            ServerSettings("m", cors_origins=(wrong,))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"cache_implementation": "static"}, {}),
        ({"prompt_lookup_num_tokens": 5}, {}),
        ({"output_hidden_states": True}, {}),
        ({"output_attentions": True}, {}),
        ({"num_beams": 4}, {"num_beams": 1}),
        ({"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 1, "num_return_sequences": 1}),
        ({"pad_token_id": 0}, {}),
        ({"force_words_ids": [[1]]}, None),
    ],
)
def test_a_model_s_own_settings_do_not_fail_requests(
    tokenizer: Any, settings: dict[str, Any], expected: dict[str, Any] | None
) -> None:
    model = tiny_model(tokenizer)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    drafter = tiny_drafter(model, tokenizer)
    if expected is None:
        with pytest.raises(InvalidInputError, match="generation_config"):
            usable_defaults(drafter)
        return
    assert usable_defaults(drafter) == expected
    if set(settings) <= {"cache_implementation", "prompt_lookup_num_tokens"}:
        ids = tokenizer("ab cd", return_tensors="pt").input_ids
        plain = tiny_drafter(tiny_model(tokenizer), tokenizer)
        options = {"max_new_tokens": 5, "do_sample": False}
        assert drafter.generate(ids, **options).tolist() == plain.generate(ids, **options).tolist()


def test_tokens_of_a_text_add_up_to_it() -> None:
    from retrieval_draft.server.openai.token_text import TokenTexts

    texts = {0: "a", 1: " the", 2: " cat"}

    def decode(ids: list[int], **_: Any) -> str:
        return "".join(texts[each] for each in ids).removeprefix(" ")  # as Llama 2's decoder does

    def call(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [0]}

    class Tokenizer(SimpleNamespace):
        __call__ = staticmethod(call)

    shown = TokenTexts(Tokenizer(decode=decode))
    assert [shown.text(token) for token in texts] == ["a", " the", " cat"]
    assert bytes(shown.bytes(1) or []) == b" the"
