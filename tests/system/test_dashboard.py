"""The dashboard in a real browser, before a real server of a tiny model."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from retrieval_draft.config import DraftConfig
from retrieval_draft.draft_service.client import DraftClient
from retrieval_draft.draft_service.errors import NotAllowedError, UnknownSessionError
from retrieval_draft.drafter import RetrievalDrafter
from retrieval_draft.http.keys import KeyRing
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.server.full_app import create_full_app
from retrieval_draft.server.service import Service
from retrieval_draft.server.settings import ServerSettings
from tests.support.browser import CHROMIUM, browser
from tests.support.models import make
from tests.support.tiny import byte_tokenizer

KEYS = {"key-of-team-a": "a", "key-of-team-b": "b"}
with_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@contextmanager
def serving(keys: dict[str, str], store: Path | None = None) -> Iterator[str]:
    tokenizer = byte_tokenizer()
    config = DraftConfig(nodes=8, adjacency_rows=1024)
    shared = None if store is None else StoreConfig(f"embedded://{store}")
    drafter = RetrievalDrafter.for_model(
        make("llama", vocab_size=len(tokenizer)), tokenizer, config=config, store=shared
    )
    service = Service(ServerSettings("<b>tiny</b>"), lambda: (drafter, tokenizer), keys=KeyRing(keys))
    server = uvicorn.Server(
        uvicorn.Config(
            create_full_app(service), port=0, log_config=None, lifespan="on", timeout_graceful_shutdown=2
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    service.wait(240)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving({}, tmp_path_factory.mktemp("dashboard") / "store") as found:
        yield found


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    with serving(KEYS) as found:
        yield found


def get(url: str, key: str | None = None) -> tuple[int, Any, bytes]:
    request = urllib.request.Request(url, headers={} if key is None else {"Authorization": f"Bearer {key}"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def complete(url: str, prompt: str, key: str = "none") -> list[Any]:
    body = {"prompt": prompt, "max_tokens": 40, "temperature": 0, "stream": True, "draft_marks": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        events = response.read().decode().split("\n\n")
    return [json.loads(event[6:]) for event in events if event.startswith("data: {")]


def snapshot(url: str, key: str = "none") -> Any:
    request = urllib.request.Request(f"{url}/dashboard/events", headers={"Authorization": f"Bearer {key}"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
        line = response.readline()
    return json.loads(line.removeprefix(b"data: "))


def test_marks_are_the_text_and_nothing_else(url: str) -> None:
    pieces = complete(url, "the cat sat on the mat and the cat sat on")
    text = "".join(piece["choices"][0]["text"] for piece in pieces)
    marks = [mark for piece in pieces for mark in piece["draft_marks"]]
    assert "".join(mark["text"] for mark in marks) == text
    assert {mark["drafted"] for mark in marks} >= {False}
    assert all(set(mark) == {"text", "drafted"} for mark in marks)


def test_the_page_lets_nothing_in_from_outside(url: str) -> None:
    for path in ("/", "/dashboard/dashboard.css", "/dashboard/dashboard.js"):
        status, headers, body = get(url + path)
        assert status == 200
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in body
        assert b"innerHTML" not in body
    assert b"<style" not in get(url)[2]
    assert b" style=" not in get(url)[2]


@with_browser
def test_the_page_shows_what_happens(url: str, tmp_path: Path) -> None:
    with browser() as page:
        page.resize(1280, 1400)
        page.open(url)
        page.wait("document.getElementById('status').textContent === 'ok'")
        assert page.text("#model") == "<b>tiny</b>", "text, not markup"
        page.run(
            "document.getElementById('prompt').value = 'the cat sat on the mat and the cat sat on the mat'"
        )
        page.run("document.getElementById('run').click()")
        page.wait("document.getElementById('ask-said').textContent.includes('tokens in')")
        assert page.text("#ask-said").startswith("96 tokens")
        assert page.run("document.querySelectorAll('#reply mark.drafted').length") > 0
        page.wait("document.querySelectorAll('#tree g').length > 1")
        page.wait("document.querySelectorAll('#by-source tr').length > 0")
        assert "automaton" in page.text("#by-source")
        assert page.wait("parseFloat(document.getElementById('rate').textContent)") > 0
        assert float(page.text("#per-step")) >= 1
        assert "connected" in page.text("#store")
        assert page.run("document.querySelector('#curve .accent').getAttribute('d').length") > 0
        light = page.run("getComputedStyle(document.body).backgroundColor")
        page.scheme("dark")
        assert page.run("getComputedStyle(document.body).backgroundColor") != light
        page.resize(360, 740, mobile=True)
        assert page.run("document.documentElement.scrollWidth") <= 360
        page.screenshot(tmp_path / "phone.png")
        assert (tmp_path / "phone.png").stat().st_size > 5000
        assert page.complaints == []
        assert all(each.startswith((url, "data:,")) for each in page.requested), page.requested


@with_browser
def test_markup_in_a_reply_stays_text(url: str) -> None:
    with browser() as page:
        page.open(url)
        page.wait("document.getElementById('status').textContent === 'ok'")
        script = "<img src=x onerror=document.title='owned'>"
        state = snapshot(url) | {"model": script, "status": script, "by_source": [[script, 2, 1]]}
        state["tree"] = {
            "nodes": [{"text": script, "parent": -1, "prob": 1, "sources": [script], "accepted": True}],
            "size": 1, "accepted": 0, "bonus": script,
        }  # fmt: skip
        page.run(f"show({json.dumps(state)})")
        assert page.text("#model") == script
        assert page.run("document.querySelectorAll('img').length") == 0
        assert page.run("document.title") == "retrieval-draft"


@with_browser
def test_with_keys_the_page_asks_for_one(guarded: str) -> None:
    with browser() as page:
        page.open(guarded)
        page.wait("!document.getElementById('login').hidden")
        assert page.run("document.getElementById('main').hidden")
        for key, message in (("a-wrong-key", "not known"), ("key-of-team-a", "")):
            page.run(f"document.getElementById('key').value = '{key}'")
            page.run("document.querySelector('#login button').click()")
            if message:
                page.wait(f"document.getElementById('login-said').textContent.includes('{message}')")
        page.wait("document.getElementById('status').textContent === 'ok'")
        assert not page.run("document.getElementById('main').hidden")


def test_a_tenant_sees_no_text_of_another(guarded: str) -> None:
    assert get(f"{guarded}/dashboard/events")[0] == 401
    assert get(f"{guarded}/metrics")[0] == 401
    complete(guarded, "aaaa bbbb aaaa bbbb aaaa", "key-of-team-a")
    mine, theirs = snapshot(guarded, "key-of-team-a"), snapshot(guarded, "key-of-team-b")
    assert mine["tree"] is not None
    assert theirs["tree"] is None
    assert theirs["tokens"] == mine["tokens"] > 0


def test_the_server_drafts_for_other_engines_too(guarded: str) -> None:
    with (
        DraftClient(guarded, api_key="key-of-team-a", timeout=60) as a,
        DraftClient(guarded, api_key="key-of-team-b", timeout=60) as b,
        DraftClient(guarded, timeout=60) as nobody,
    ):
        session = a.open([7, 8, 9, 4, 7, 8])
        assert 9 in session.step([9, 4, 7, 8], nodes=8).tokens[1:]
        stolen = b.open([7])
        stolen._key = session._key
        with pytest.raises(UnknownSessionError):
            stolen.step([8])
        with pytest.raises(NotAllowedError):
            nobody.open([7])
        assert a.info().sessions == 1
        session.close()
        assert a.info().sessions == 0
    status, _, page = get(f"{guarded}/metrics", "key-of-team-a")
    assert status == 200
    assert b"retrieval_draft:drafting_steps_total 1.0" in page or b"drafting_steps_total 2.0" in page


def test_open_pages_do_not_keep_the_server(tmp_path: Path) -> None:
    with serving({}) as url:
        reader = urllib.request.urlopen(f"{url}/dashboard/events", timeout=30)  # noqa: S310
        reader.readline()
    reader.close()
