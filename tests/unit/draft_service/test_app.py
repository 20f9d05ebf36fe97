from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrieval_draft.draft_service import wire
from retrieval_draft.draft_service.app import DraftApp
from retrieval_draft.draft_service.service import DraftService
from retrieval_draft.http.keys import KeyRing
from tests.support.draft_services import call, draft_service, error_of_body, post


@pytest.fixture(scope="module")
def service() -> Iterator[DraftService]:
    with draft_service(max_sessions=100_000) as made:
        yield made


@pytest.fixture(scope="module")
def app(service: DraftService) -> Iterator[DraftApp]:
    made = DraftApp(service, max_body=2000)
    yield made
    made.close()


def opened(app: DraftApp, *prompt: int, **options: Any) -> str:
    status, body = post(app, "/v1/draft/open", wire.OpenRequest(prompt=list(prompt)), **options)
    assert status == 200, body
    return wire.decode(body, wire.OpenReply).session


@pytest.mark.parametrize("json", [False, True])
def test_a_session_from_beginning_to_end(app: DraftApp, json: bool) -> None:
    status, body = post(app, "/v1/draft/open", wire.OpenRequest(prompt=[7, 8, 9]), json=json)
    key = wire.decode(body, wire.OpenReply, json).session
    steps = [wire.Step(session=key, tokens=[7, 8])]
    status, body = post(app, "/v1/draft/step", wire.StepRequest(steps=steps), json=json)
    assert status == 200
    assert 9 in wire.decode(body, wire.StepReply, json).drafts[0].tokens
    steps = [wire.Step(session=key, close="finished"), wire.Step(session=key)]
    status, body = post(app, "/v1/draft/step", wire.StepRequest(steps=steps), json=json)
    drafts = wire.decode(body, wire.StepReply, json).drafts
    assert drafts[0].error is None
    assert drafts[1].error is not None
    assert drafts[1].error.code == 404


def test_a_session_that_is_not_there_is_a_404(app: DraftApp) -> None:
    request = wire.StepRequest(steps=[wire.Step(session="nobody")])
    status, body = post(app, "/v1/draft/step", request)
    failure = error_of_body(body)
    assert (status, failure.code, failure.type) == (404, 404, "not_found_error")
    assert "'nobody'" in failure.message
    assert "Open another one" in failure.hint


def test_it_says_what_it_is(app: DraftApp) -> None:
    status, headers, body = call(app, "/v1/draft", method="GET")
    info = wire.decode(body, wire.Info)
    assert (status, info.vocabulary, info.store, info.version) == (200, 64, "", 1)
    assert headers["content-type"] == wire.MESSAGE_PACK


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/draft/step", 405),
        ("POST", "/v1/draft", 405),
        ("POST", "/v1/draft/else", 404),
        ("DELETE", "/v1/draft/open", 405),
    ],
)
def test_other_paths_and_methods(app: DraftApp, method: str, path: str, status: int) -> None:
    assert call(app, path, method=method)[0] == status


def test_a_body_that_is_too_long(app: DraftApp) -> None:
    assert post(app, "/v1/draft/open", wire.OpenRequest(prompt=[1] * 3000))[0] == 413
    length = (("content-length", "3000"),)
    assert call(app, "/v1/draft/open", headers=length)[0] == 413


def test_keys_are_tenants(service: DraftService) -> None:
    app = DraftApp(service, KeyRing({"key-of-team-a": "a", "key-of-team-b": "b"}).tenant)
    mine, theirs = ((("authorization", f"Bearer key-of-team-{name}"),) for name in "ab")
    key = opened(app, 1, headers=mine)
    request = wire.StepRequest(steps=[wire.Step(session=key)])
    assert post(app, "/v1/draft/step", request, headers=mine)[0] == 200
    assert post(app, "/v1/draft/step", request, headers=theirs)[0] == 404
    wrong: tuple[tuple[tuple[str, str], ...], ...] = ((), (("authorization", "Bearer guess"),))
    for headers in wrong:
        status, found, body = call(app, "/v1/draft/step", wire.encode(request), headers=headers)
        assert (status, found["www-authenticate"]) == (401, "Bearer")
        assert error_of_body(body).type == "authentication_error"
    app.close()


def test_a_full_service_says_when_to_come_back() -> None:
    with draft_service(max_sessions=1) as service:
        app = DraftApp(service)
        opened(app, 1)
        status, headers, _ = call(app, "/v1/draft/open", wire.encode(wire.OpenRequest(prompt=[1])))
        assert (status, headers["retry-after"]) == (429, "1")
        app.close()


def test_a_client_that_leaves_in_the_middle_is_no_failure(app: DraftApp) -> None:
    incoming = [
        {"type": "http.request", "body": b"\x81", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/draft/open", "headers": []}
    asyncio.run(app(scope, receive, send))
    assert sent == []


def test_a_body_that_does_not_come_is_given_up(service: DraftService) -> None:
    app = DraftApp(service, body_seconds=0.05)
    incoming = [{"type": "http.request", "body": b"\x81", "more_body": True}]
    sent: list[Any] = []

    async def receive() -> Any:
        if not incoming:
            await asyncio.sleep(60)
        return incoming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/draft/open", "headers": []}
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 10))
    assert sent[0]["status"] == 408
    app.close()


def test_a_bug_is_a_500_without_its_words(app: DraftApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise KeyError("a secret")

    monkeypatch.setattr(app.service, "open", broken)
    status, body = post(app, "/v1/draft/open", wire.OpenRequest(prompt=[1]))
    assert status == 500
    assert b"secret" not in body


numbers = st.integers(-2, 70) | st.integers() | st.floats() | st.booleans() | st.none()
anything = st.recursive(
    numbers | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ids = st.lists(st.integers(-1, 65), max_size=6) | anything
rows = st.lists(st.lists(numbers, max_size=3), max_size=3) | anything
top_logprobs = st.fixed_dictionaries(
    {"tokens": rows, "probs": st.lists(st.lists(st.floats(0, 1), max_size=3), max_size=3) | anything},
    optional={"nodes": st.lists(st.integers(0, 70), max_size=3) | anything},
)
steps = st.fixed_dictionaries(
    {"session": st.just("KEY") | anything},
    optional={
        "tokens": ids,
        "at": st.integers(0, 9) | anything,
        "nodes": st.integers(0, 70) | anything,
        "deepest": st.integers(0, 9) | anything,
        "chain": st.booleans() | anything,
        "floor": st.floats(0, 1) | anything,
        "said": top_logprobs | anything,
        "extra": anything,
    },
)
bodies = st.one_of(
    st.fixed_dictionaries({"steps": st.lists(steps, max_size=3) | anything}),
    st.fixed_dictionaries(
        {"prompt": ids}, optional={"references": st.lists(ids, max_size=2), "nodes": numbers}
    ),
    anything,
)


def filled(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: filled(each, key) for name, each in value.items()}
    if isinstance(value, list):
        return [filled(each, key) for each in value]
    return key if value == "KEY" else value


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies, path=st.sampled_from(["/open", "/step"]), json=st.booleans())
def test_no_body_makes_the_service_fail(app: DraftApp, body: Any, path: str, json: bool) -> None:
    key = opened(app, 5, 6, 5)
    content = filled(body, key)
    try:
        sent = msgspec.json.encode(content) if json else msgspec.msgpack.encode(content)
    except (OverflowError, TypeError, ValueError, UnicodeEncodeError):
        return
    status, _, answer = call(app, f"/v1/draft{path}", sent, json=json)
    assert status in (200, 400, 404, 409, 413), answer
    if status == 200 and path == "/step":
        for draft in wire.decode(answer, wire.StepReply, json).drafts:
            assert draft.error is None or draft.error.code < 500, draft.error


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=200), path=st.sampled_from(["/open", "/step"]), json=st.booleans())
def test_no_bytes_make_the_service_fail(app: DraftApp, body: bytes, path: str, json: bool) -> None:
    assert call(app, f"/v1/draft{path}", body, json=json)[0] in (200, 400, 404)
