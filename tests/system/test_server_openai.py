"""The official client against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.support.servers import MODEL, Running, serving, tiny_drafter, tiny_model, tiny_tokenizer

PROMPT = "ab cd ab cd ab"
KEY = {"api_key": "none-needed"}


class World:
    """A server, and the same model offline."""

    def __init__(self, running: Running, offline: Any, tokenizer: Any) -> None:
        self.running, self.offline, self.tokenizer = running, offline, tokenizer
        self.client = openai.OpenAI(base_url=f"{running.url}/v1", max_retries=0, **KEY)

    def reply(self, prompt: str, tokens: int, **options: Any) -> list[list[int]]:
        """The library's reply offline."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        if options.get("do_sample"):
            options.setdefault("top_k", 0)
        out = self.offline.generate(ids, max_new_tokens=tokens, **options)
        replies = []
        for row in out[:, ids.shape[1] :].tolist():
            end = row.index(0) + 1 if 0 in row else len(row)
            replies.append(row[:end])
        return replies

    def long_seed(self, prompt: str, tokens: int) -> int:
        """A seed whose reply does not end early."""
        for seed in range(100):
            (reply,) = self.reply(prompt, tokens, do_sample=True, temperature=1.0, seed=seed)
            if len(reply) == tokens:
                return seed
        raise AssertionError("all replies end early")

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, eos_token_id=0)
    offline = tiny_drafter(tiny_model(tokenizer, eos_token_id=0), tokenizer)
    with serving(tiny_drafter(model, tokenizer), tokenizer, max_batch=8) as running:
        yield World(running, offline, tokenizer)


def ids_of(choice: Any) -> list[int]:
    return list(choice.model_extra["token_ids"])


def test_greedy_completion_is_what_the_library_says(world: World) -> None:
    (expected,) = world.reply(PROMPT, 24, do_sample=False)
    response = world.client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, extra_body={"return_token_ids": True}
    )
    assert response.object == "text_completion"
    assert ids_of(response.choices[0]) == expected
    assert response.choices[0].text == world.text(expected)
    assert response.choices[0].finish_reason == ("stop" if expected[-1] == 0 else "length")
    assert response.usage is not None
    assert response.usage.completion_tokens == len(expected)
    assert response.usage.prompt_tokens == len(world.tokenizer(PROMPT)["input_ids"])


@pytest.mark.parametrize("stream", [False, True])
def test_seeded_samples_are_those_of_the_library(world: World, stream: bool) -> None:
    expected = world.reply(
        PROMPT, 20, do_sample=True, temperature=1.2, top_p=0.9, seed=7, num_return_sequences=3
    )
    options: Any = {
        "model": MODEL, "prompt": PROMPT, "max_tokens": 20, "temperature": 1.2, "top_p": 0.9, "seed": 7,
        "n": 3, "stream": stream, "extra_body": {"return_token_ids": True},
    }  # fmt: skip
    response = world.client.completions.create(**options)
    texts, ids = ["", "", ""], [[], [], []]
    if stream:
        for piece in response:
            for choice in piece.choices:
                texts[choice.index] += choice.text
                ids[choice.index] += ids_of(choice)
    else:
        for choice in response.choices:
            texts[choice.index], ids[choice.index] = choice.text, ids_of(choice)
    assert ids == expected
    assert texts == [world.text(each) for each in expected]
    assert len({tuple(each) for each in ids}) > 1


def test_a_crowd_gets_what_each_would_get_alone(world: World) -> None:
    def one(seed: int) -> list[int]:
        response = world.client.completions.create(
            model=MODEL, prompt=PROMPT + " ef" * (seed % 4), max_tokens=5 + seed, temperature=1, seed=seed,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        return ids_of(response.choices[0])

    with ThreadPoolExecutor(16) as pool:
        response = list(pool.map(one, range(24)))
    for seed, ids in enumerate(response):
        prompt = PROMPT + " ef" * (seed % 4)
        assert [ids] == world.reply(prompt, 5 + seed, do_sample=True, temperature=1.0, seed=seed)


def test_chat_with_the_template_whole_and_streamed(world: World) -> None:
    messages: Any = [
        {"role": "user", "content": "ab cd"},
        {"role": "assistant", "content": [{"type": "text", "text": "ef"}]},
        {"role": "user", "content": "gh"},
    ]
    (expected,) = world.reply("ab cd ef gh ", 16, do_sample=True, temperature=1.0, seed=3)
    options: Any = {
        "model": MODEL, "messages": messages, "max_completion_tokens": 16, "temperature": 1, "seed": 3
    }  # fmt: skip
    response = world.client.chat.completions.create(**options)
    assert response.object == "chat.completion"
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].message.content == world.text(expected)
    pieces = list(
        world.client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == world.text(expected)
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == len(expected)
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}


def test_the_async_client_streams(world: World) -> None:
    (expected,) = world.reply(PROMPT, 12, do_sample=False)

    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{world.running.url}/v1", **KEY) as client:
            stream = await client.completions.create(
                model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stream=True
            )
            return "".join([piece.choices[0].text async for piece in stream if piece.choices])

    assert asyncio.run(ask()) == world.text(expected)


def test_stop_strings_cut_the_text_and_end_the_row(world: World) -> None:
    seed = world.long_seed(PROMPT, 40)
    (whole,) = world.reply(PROMPT, 40, do_sample=True, temperature=1.0, seed=seed)
    text = world.text(whole)
    stop = text[8:11]  # it straddles tokens
    for stream in (False, True):
        options: Any = {
            "model": MODEL, "prompt": PROMPT, "max_tokens": 40, "temperature": 1, "seed": seed,
            "stop": ["nowhere", stop], "stream": stream,
        }  # fmt: skip
        response = world.client.completions.create(**options)
        if stream:
            pieces = [piece.choices[0] for piece in response if piece.choices]
            got, reason = "".join(piece.text for piece in pieces), pieces[-1].finish_reason
        else:
            got, reason = response.choices[0].text, response.choices[0].finish_reason
            assert response.usage.completion_tokens < len(whole)
        assert got == text[: text.index(stop)]
        assert reason == "stop"


def test_logprobs_are_those_of_the_model(world: World) -> None:
    response = world.client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3, echo=True,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    choice = response.choices[0]
    prompt = world.tokenizer(PROMPT)["input_ids"]
    ids = [*prompt, *ids_of(choice)]
    with torch.no_grad():
        model = world.offline.continuous.target.model
        wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs[0] is None
    for index in range(1, len(ids)):
        assert logprobs.token_logprobs[index] == pytest.approx(float(wanted[index - 1, ids[index]]), abs=1e-4)
        best = wanted[index - 1].topk(3).values.tolist()
        named = sorted(logprobs.top_logprobs[index].values(), reverse=True)
        assert named[:3] == pytest.approx(best, abs=1e-4)
    assert choice.text.startswith(PROMPT)
    assert len(logprobs.tokens) == len(ids)
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if token != "<eos>":
            assert choice.text[offset : offset + len(token)] == token


def test_chat_logprobs(world: World) -> None:
    response = world.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "ab"}], max_tokens=4, temperature=0,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    content = response.choices[0].logprobs.content
    assert len(content) == response.usage.completion_tokens
    for token in content:
        assert token.logprob <= 0
        assert token.top_logprobs[0].token == token.token
        assert bytes(token.bytes).decode() == token.token


def test_only_the_prompt_can_be_scored(world: World) -> None:
    response = world.client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0, temperature=0
    )
    assert response.choices[0].text == PROMPT
    assert response.usage.completion_tokens == 0
    assert len(response.choices[0].logprobs.tokens) == response.usage.prompt_tokens


def test_the_best_samples_are_those_of_the_library(world: World) -> None:
    expected = world.reply(
        PROMPT, 10, do_sample=True, temperature=1.0, seed=5, num_return_sequences=2, best_of=5
    )
    response = world.client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=10, temperature=1, seed=5, n=2, best_of=5,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert [ids_of(choice) for choice in response.choices] == expected


def test_several_prompts_as_text_and_as_ids(world: World) -> None:
    prompts = ["ab ab", "cd ef gh", "a"]
    expected = [world.reply(prompt, 7, do_sample=False)[0] for prompt in prompts]
    ids = [world.tokenizer(prompt)["input_ids"] for prompt in prompts]
    for given in (prompts, ids):
        response = world.client.completions.create(
            model=MODEL, prompt=given, max_tokens=7, temperature=0, n=2,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        assert [choice.index for choice in response.choices] == list(range(6))
        assert [ids_of(choice) for choice in response.choices] == [
            each for each in expected for _ in range(2)
        ]


def test_a_prediction_is_drafted_from_and_counted(world: World) -> None:
    seed = world.long_seed(f"{PROMPT} ", 40)  # as the template has it
    options: Any = {
        "model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 40,
        "temperature": 1, "seed": seed, "extra_body": {"metrics": True, "return_token_ids": True},
    }  # fmt: skip
    plain = world.client.chat.completions.create(**options)
    reply = plain.choices[0].message.content
    response = world.client.chat.completions.create(
        **options, prediction={"type": "content", "content": reply}
    )
    assert ids_of(response.choices[0]) == ids_of(plain.choices[0])
    details = response.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 0
    length = len(world.tokenizer(reply)["input_ids"])
    assert details.accepted_prediction_tokens + details.rejected_prediction_tokens >= length
    drafting = response.model_extra["metrics"]["speculative_decoding"]
    assert drafting["num_accepted_draft_tokens"] > 0
    assert drafting["mean_acceptance_length"] > 1
    assert sum(drafting["acceptance_histogram"]) == drafting["num_spec_steps"]


def test_penalties_and_bias_change_the_reply_as_they_should(world: World) -> None:
    def ask(**options: Any) -> list[int]:
        response = world.client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True}, **options,
        )  # fmt: skip
        return ids_of(response.choices[0])

    assert set(ask(logit_bias={"5": 100})) == {5}
    free = ask(logit_bias={"5": 20, "6": 19})
    held = ask(logit_bias={"5": 20, "6": 19}, presence_penalty=2, frequency_penalty=2)
    assert set(free) == {5}
    assert {5, 6} <= set(held)


def test_models_and_health(world: World) -> None:
    assert [model.id for model in world.client.models.list()] == [MODEL]
    assert world.client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        world.client.models.retrieve("other")
    health = httpx.get(f"{world.running.url}/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "ab", "temperature": -1}, "temperature"),
        ("completions", {"prompt": "ab", "n": 0}, "n"),
        ("completions", {}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": [99999]}, None),
        ("completions", {"prompt": "ab", "suffix": "x"}, "suffix"),
        ("completions", {"prompt": "ab", "n": 9, "temperature": 1}, "n"),
        ("completions", {"prompt": "ab", "best_of": 1, "n": 2}, "best_of"),
        ("completions", {"prompt": "ab", "logit_bias": {"99999": 1}}, "logit_bias"),
        ("completions", {"prompt": "ab", "share": "all"}, None),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "picture"}},
            "response_format",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
        ),
    ],
)
def test_what_cannot_be_done_is_said(
    world: World, path: str, body: dict[str, Any], param: str | None
) -> None:
    response = httpx.post(f"{world.running.url}/v1/{path}", json={"model": MODEL, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


def test_errors_have_openais_shape_everywhere(world: World) -> None:
    url = world.running.url
    cases = [
        (httpx.get(f"{url}/nowhere"), 404),
        (httpx.get(f"{url}/v1/completions"), 405),
        (httpx.post(f"{url}/v1/completions", json={"model": "other", "prompt": "a"}), 404),
    ]
    for content in (b"{broken", b"[" * 100_000, b"\xff\xfe", b'{"prompt": "\\ud800"}', b"1" * 9000):
        headers = {"content-type": "application/json"}
        cases.append((httpx.post(f"{url}/v1/completions", content=content, headers=headers), 400))
    for response, status in cases:
        assert response.status_code == status, response.text
        assert response.json()["error"]["code"] == status
        assert response.headers["x-request-id"]
    named = httpx.get(f"{url}/health", headers={"X-Request-Id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    assert httpx.get(f"{url}/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"


def test_nothing_is_left_behind(world: World) -> None:
    assert world.running.wait_idle()
    assert world.running.engine.waiting == 0
