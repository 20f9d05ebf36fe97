"""Clients that leave, read slowly or send rubbish, and a model that raises: the others do not notice."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support.servers import MODEL, Running, serving, tiny_drafter, tiny_model, tiny_tokenizer

LONG = {"model": MODEL, "prompt": "ab cd ab cd", "ignore_eos": True, "temperature": 1.0, "seed": 1}


def post(running: Running, timeout: float = 60.0, **body: Any) -> httpx.Response:
    return httpx.post(f"{running.url}/v1/completions", json={**LONG, **body}, timeout=timeout)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def running(tokenizer: Any) -> Iterator[Running]:
    drafter = tiny_drafter(tiny_model(tokenizer, max_position_embeddings=65536), tokenizer)
    drafter.warm_up()
    with serving(
        drafter, tokenizer, max_batch=4, max_queue=8, max_choices=8, max_tokens=60_000,
        max_body_bytes=100_000, unread_tokens=2000, send_seconds=2.0,
    ) as made:  # fmt: skip
        yield made


def raw_request(running: Running, body: dict[str, Any], receive_buffer: int | None = None) -> socket.socket:
    """A connection that has sent a request and not read anything."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(30)
    sock.connect((running.host, running.port))
    content = json.dumps({**LONG, **body}).encode()
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )
    return sock


def until(condition: Any, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_rows(running: Running, stream: bool) -> None:
    sock = raw_request(running, {"max_tokens": 60_000, "stream": stream, "n": 3})
    assert until(lambda: running.engine.running == 3)
    sock.close()
    assert running.wait_idle()
    assert post(running, max_tokens=3).status_code == 200


def test_one_that_hangs_up_while_it_waits_leaves_the_queue(running: Running) -> None:
    first = raw_request(running, {"max_tokens": 60_000, "n": 4})
    assert until(lambda: running.engine.running == 4)
    second = raw_request(running, {"max_tokens": 60_000})
    assert until(lambda: running.engine.waiting == 1)
    second.close()
    assert until(lambda: running.engine.waiting == 0)
    assert running.engine.running == 4
    first.close()
    assert running.wait_idle()


def test_a_slow_reader_is_given_up_and_holds_nobody_up(running: Running) -> None:
    # Kilobytes for each token, so that the buffers of the kernel are soon full.
    slow = raw_request(running, {"max_tokens": 60_000, "stream": True, "logprobs": 17, "n": 3}, 4096)
    assert until(lambda: running.engine.running == 3)
    assert post(running, max_tokens=30).status_code == 200
    assert running.wait_idle(120)
    assert until(lambda: not running.server.server_state.tasks)
    slow.close()


def test_a_full_queue_answers_429(running: Running) -> None:
    sock = raw_request(running, {"max_tokens": 60_000, "n": 4})
    assert until(lambda: running.engine.running == 4)
    more = [raw_request(running, {"max_tokens": 60_000, "n": 4}) for _ in range(2)]
    assert until(lambda: running.engine.waiting == 8)
    refused = post(running, max_tokens=1)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for each in (sock, *more):
        each.close()
    assert running.wait_idle()


def test_of_those_that_wait_the_lowest_priority_comes_first(running: Running) -> None:
    first = raw_request(running, {"max_tokens": 60_000, "n": 4})
    assert until(lambda: running.engine.running == 4)
    late, urgent = (
        raw_request(running, {"max_tokens": 60_000, "n": 4, "priority": priority}) for priority in (1, -1)
    )
    assert until(lambda: running.engine.waiting == 8)
    first.close()
    assert until(lambda: running.engine.waiting == 4)
    assert until(lambda: {choice.job.priority for choice in running.engine._choices.values()} == {-1})
    urgent.close()
    late.close()
    assert running.wait_idle()


def test_long_bodies_are_refused_announced_or_not(running: Running) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(160):
            yield b" " * 65536

    headers = {"content-type": "application/json"}
    url = f"{running.url}/v1/completions"
    for content in (b" " * (10 << 20), chunks()):
        response = httpx.post(url, content=content, headers=headers, timeout=60)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == 413
    assert post(running, max_tokens=1).status_code == 200


def test_what_is_no_http_ends_that_connection_only(running: Running) -> None:
    for rubbish in (b"\x00\xff\xfe\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n"):
        with socket.create_connection((running.host, running.port), timeout=10) as sock:
            sock.sendall(rubbish)
    assert post(running, max_tokens=1).status_code == 200


def test_a_request_out_of_time_is_told_so(tokenizer: Any) -> None:
    drafter = tiny_drafter(tiny_model(tokenizer, max_position_embeddings=65536), tokenizer)
    with serving(drafter, tokenizer, request_seconds=1.0, max_tokens=60_000) as running:
        response = post(running, max_tokens=60_000)
        assert response.status_code == 504
        assert response.json()["error"]["type"] == "timeout_error"
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json={**LONG, "max_tokens": 60_000, "stream": True},
            timeout=60,
        ) as streamed:  # fmt: skip
            lines = [line for line in streamed.iter_lines() if line]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == 504
        assert lines[-1] == "data: [DONE]"
        assert running.wait_idle()


class Faulty:
    """A hook that makes a model raise."""

    def __init__(self, model: Any) -> None:
        self.poison: int | None = None
        self.times = 0
        self.every = 0  # so many passes between two that raise
        self._passes = 0
        model.register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"]
        self._passes += 1
        if self.every and self._passes % self.every == 0:
            raise RuntimeError("out of memory, say")
        if self.times > 0:
            self.times -= 1
            raise RuntimeError("out of memory, say")
        if self.poison is not None and (ids == self.poison).any():
            raise RuntimeError("this token breaks the model")


@pytest.fixture
def faulty(tokenizer: Any) -> Iterator[tuple[Running, Faulty, Any]]:
    model = tiny_model(tokenizer)
    drafter = tiny_drafter(model, tokenizer)
    drafter.warm_up()
    fault = Faulty(model)
    offline = tiny_drafter(tiny_model(tokenizer), tokenizer)
    with serving(drafter, tokenizer, max_batch=4) as running:
        yield running, fault, offline


def reply(offline: Any, tokenizer: Any, prompt: str, tokens: int, seed: int, **options: Any) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = offline.generate(
        ids, max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, seed=seed, **options
    )
    return list(out[0, ids.shape[1] :].tolist())


def test_a_step_that_raises_once_costs_nobody_anything(
    faulty: tuple[Running, Faulty, Any], tokenizer: Any
) -> None:
    running, fault, offline = faulty
    with ThreadPoolExecutor(3) as pool:
        futures = [
            pool.submit(post, running, max_tokens=300, seed=seed, return_token_ids=True) for seed in range(3)
        ]
        # A prompt's own pass is not made again: all three must have joined.
        assert until(lambda: len(running.engine._choices) == 3)
        fault.every = 7  # more than the passes that follow one that raised
        answers = [each.result() for each in futures]
    for seed, answer in enumerate(answers):
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["token_ids"] == reply(
            offline, tokenizer, LONG["prompt"], 300, seed
        )
    assert running.wait_idle()


def test_a_row_that_breaks_the_model_fails_alone(faulty: tuple[Running, Faulty, Any], tokenizer: Any) -> None:
    running, fault, offline = faulty
    letter = tokenizer("h")["input_ids"][0]
    fault.poison = letter
    ban = {str(letter): -100}
    with ThreadPoolExecutor(3) as pool:
        good = [
            pool.submit(post, running, max_tokens=200, seed=seed, logit_bias=ban, return_token_ids=True)
            for seed in range(2)
        ]
        assert until(lambda: running.engine.running == 2)
        bad = post(running, max_tokens=200, logit_bias={str(letter): 100})
        answers = [each.result() for each in good]
    assert bad.status_code == 500
    assert "breaks" not in bad.text  # what raised is for the log
    for seed, answer in enumerate(answers):
        assert answer.status_code == 200
        expected = reply(offline, tokenizer, LONG["prompt"], 200, seed, sequence_bias={(letter,): -100.0})
        assert answer.json()["choices"][0]["token_ids"] == expected
    assert running.wait_idle()


def test_a_model_that_always_raises_fails_requests_and_not_the_server(
    faulty: tuple[Running, Faulty, Any],
) -> None:
    running, fault, _ = faulty
    fault.times = 1 << 30
    for stream in (False, True):
        response = post(running, max_tokens=5, stream=stream)
        if stream:
            lines = [line for line in response.text.splitlines() if line]
            assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == 500
            assert lines[-1] == "data: [DONE]"
        else:
            assert response.status_code == 500
    assert running.wait_idle()
    fault.times = 0
    assert post(running, max_tokens=5).status_code == 200
    assert httpx.get(f"{running.url}/health").status_code == 200


def test_a_step_that_hangs_is_seen_in_health(tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    drafter = tiny_drafter(model, tokenizer)
    drafter.warm_up()
    release, hangs = threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        if hangs.is_set():
            release.wait(60)

    model.register_forward_pre_hook(hang)
    with serving(drafter, tokenizer, stuck_seconds=0.2) as running:
        hangs.set()
        sock = raw_request(running, {"max_tokens": 5})
        health = f"{running.url}/health"
        assert until(lambda: httpx.get(health).status_code == 503)
        assert httpx.get(health).json()["status"] == "stuck"
        release.set()
        assert until(lambda: httpx.get(health).status_code == 200)
        sock.close()
        assert running.wait_idle()


def test_keys_let_in_and_keep_tenants_apart(tokenizer: Any) -> None:
    drafter = tiny_drafter(tiny_model(tokenizer), tokenizer)
    keys = {"key-of-anna": "anna", "key-of-bert": "bert"}
    with serving(drafter, tokenizer, keys=keys) as running:
        url = f"{running.url}/v1/completions"

        def ask(key: str | None) -> httpx.Response:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            body = {**LONG, "prompt": "ab cd ef gh", "max_tokens": 64, "metrics": True}
            return httpx.post(url, json=body, headers=headers, timeout=60)

        for key in (None, "x", "key-of-ann", "key-of-anna "[:-2]):
            refused = ask(key)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{running.url}/health").status_code == 200
        first = ask("key-of-anna").json()
        running.service.loaded.tenants["anna"].flush()
        again = ask("key-of-anna").json()
        running.service.loaded.tenants["anna"].flush()
        other = ask("key-of-bert").json()
        assert first["choices"] == again["choices"] == other["choices"]
        by_level = [
            each["metrics"]["speculative_decoding"]["accepted_by_level"] for each in (first, again, other)
        ]
        assert "history" not in by_level[0]
        assert by_level[1].get("history", 0) > 0
        assert "history" not in by_level[2]
        anna, bert = (running.service.loaded.tenants[name] for name in ("anna", "bert"))
        assert anna is not bert
        assert anna is not drafter
