"""Tenants beside each other: long prompts, many requests, chosen ids, clients that leave."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from retrieval_draft.server.dashboard.watcher import Watcher
from tests.support.raw_http import post as raw_post
from tests.support.servers import MODEL, Running, serving, tiny_drafter, tiny_model, tiny_tokenizer

KEYS = {"key-of-tenant-a": "a", "key-of-tenant-b": "b"}
A, B = ({"Authorization": f"Bearer key-of-tenant-{tenant}"} for tenant in "ab")
LONG = 12_000


@pytest.fixture(scope="module")
def watcher() -> Watcher:
    return Watcher(str)


@pytest.fixture(scope="module")
def running(watcher: Watcher) -> Iterator[Running]:
    tokenizer = tiny_tokenizer()
    drafter = tiny_drafter(tiny_model(tokenizer, max_position_embeddings=65536), tokenizer)
    drafter.warm_up()
    with serving(
        drafter, tokenizer, keys=KEYS, listeners=[watcher], max_batch=4, max_queue=16, max_choices=8,
        max_tokens=60_000, max_reference_tokens=1000,
    ) as made:  # fmt: skip
        yield made


def ask(running: Running, headers: dict[str, str], **body: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "ab cd", "max_tokens": 1, "temperature": 0, **body}
    return httpx.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=120)


def long_prompt() -> list[int]:
    return [random.randrange(16) for _ in range(LONG)]


def send(running: Running, body: Any, tenant: str = "a", *headers: str) -> socket.socket:
    connection = socket.create_connection((running.host, running.port))
    authorization = f"Authorization: Bearer key-of-tenant-{tenant}"
    connection.sendall(raw_post("/v1/completions", body, authorization, *headers))
    return connection


@pytest.mark.parametrize("other", [A, B])
def test_nobody_waits_for_a_long_prompt(running: Running, other: dict[str, str]) -> None:
    connections = [send(running, {"prompt": long_prompt(), "max_tokens": 1}) for _ in range(2)]
    until = time.monotonic() + 30
    while len(running.engine._joining) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    for _ in range(3):
        assert ask(running, other).status_code == 200
        assert len(running.engine._joining) == 2  # they are still being read
    for connection in connections:
        connection.close()
    assert running.wait_idle()


def test_a_long_prompt_says_the_same_beside_others(running: Running) -> None:
    prompt = long_prompt()[:4000]
    body = {"prompt": prompt, "max_tokens": 8, "seed": 1, "temperature": 1.0, "return_token_ids": True}
    alone = ask(running, A, **body).json()["choices"][0]["token_ids"]
    others = [send(running, {"prompt": long_prompt()[:3000], "max_tokens": 2}, "b") for _ in range(2)]
    assert ask(running, A, **body).json()["choices"][0]["token_ids"] == alone
    for connection in others:
        connection.close()
    assert running.wait_idle()


def test_a_tenant_cannot_take_the_whole_queue(running: Running) -> None:
    body = {"prompt": "ab", "max_tokens": 50_000, "ignore_eos": True}
    with ExitStack() as stack:  # what is not closed would be decoded beside all tests that follow
        taken: list[socket.socket] = []
        until = time.monotonic() + 60
        # Before the first four run, eight that wait may have others refused: more follow until both are full.
        while (running.engine.running, running.engine.waiting) != (4, 8) and time.monotonic() < until:
            if len(taken) < 12 or running.engine.waiting < 8:
                taken.append(stack.enter_context(send(running, body)))
            time.sleep(0.05)
        assert (running.engine.running, running.engine.waiting) == (4, 8)
        assert ask(running, A).status_code == 429
        results: list[int] = []
        asking = threading.Thread(target=lambda: results.append(ask(running, B).status_code))
        asking.start()
        time.sleep(0.3)
        for connection in taken[:6]:  # a row is free: it is the other tenant's turn
            connection.close()
        asking.join(120)
        assert results == [200]
    assert running.wait_idle()


def test_who_has_left_leaves_nothing_to_do(running: Running) -> None:
    text = "".join(random.choice("abcdefgh") for _ in range(1_000_000))
    for _ in range(12):
        send(running, {"prompt": text, "max_tokens": 1}).close()
    began = time.monotonic()
    assert ask(running, B).status_code == 200
    assert ask(running, A).status_code == 200
    assert time.monotonic() - began < 30  # twelve such prompts take longer on any machine
    until = time.monotonic() + 30
    while running.service._preparing._lanes and time.monotonic() < until:
        time.sleep(0.01)
    assert not running.service._preparing._lanes
    assert running.wait_idle()


def test_references_have_a_limit_of_their_own(running: Running) -> None:
    for body in (
        {"documents": "ab " * 2000},
        {"documents": ["ab " * 200] * 10},
        {"prediction": {"content": "a b " * 2000}},
    ):
        response = ask(running, A, **body)
        assert response.status_code == 400
        assert "1000 tokens" in response.json()["error"]["message"]
    assert ask(running, A, documents=["ab " * 100], prediction={"content": "ab"}).status_code == 200


def test_a_prompt_that_cannot_fit_is_not_tokenised(running: Running) -> None:
    response = ask(running, A, prompt="a" * 3_000_000)
    assert response.status_code == 400
    assert "characters" in response.json()["error"]["message"]


def test_a_chosen_id_shows_nobody_else_anything(running: Running, watcher: Watcher) -> None:
    chosen = {"X-Request-Id": "req-1"}
    secret = "gh gh ef ef " * 30
    response = httpx.post(
        f"{running.url}/v1/completions", json={"prompt": secret, "max_tokens": 60, "ignore_eos": True},
        headers={**A, **chosen}, timeout=60,
    )  # fmt: skip
    assert response.headers["x-request-id"] == "req-1"  # it is echoed
    assert "req-1" not in response.json()["id"]
    ask(running, {**B, **chosen}, max_tokens=2)
    snapshot = watcher.snapshot("b")
    assert snapshot["tree"] is None or snapshot["tree"]["size"] <= 3
    watcher.count()
    assert "req-1" not in watcher._tenants


def test_an_id_that_is_no_name_is_not_echoed(running: Running) -> None:
    for wrong in ("a b", "a" * 129, "{}", "ä".encode().decode("latin-1")):
        response = httpx.get(
            f"{running.url}/v1/models", headers={**A, "X-Request-Id": wrong.encode("latin-1")}
        )
        assert response.headers["x-request-id"] != wrong


def test_the_log_has_both_ids(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    from retrieval_draft.drafting.stats import DraftStats
    from retrieval_draft.server.observability.request_log import RequestLog
    from retrieval_draft.server.scheduler.events import RequestEnd

    with caplog.at_level("INFO", "retrieval_draft.server.requests"):
        RequestLog().request_ended(RequestEnd("mine", 0, "a", "stop", 1, 1, 0.0, 0.0, DraftStats(), "theirs"))
    assert "request_id=mine client_id=theirs" in caplog.text
