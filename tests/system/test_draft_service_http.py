"""The drafting service speaks HTTP as the server does: bounded heads, upgrades declined, headers named."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from retrieval_draft.draft_service.app import DraftApp
from retrieval_draft.draft_service.standalone import StandaloneApp
from retrieval_draft.http.keys import KeyRing
from retrieval_draft.http.protocol import http_config
from tests.support.draft_services import draft_service
from tests.support.raw_http import answers, exchange, post

BODY = {"prompt": [1, 2, 3]}
KEY = "Authorization: Bearer a-long-key"
OPEN = "/v1/draft/open"


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with draft_service() as service:
        app = StandaloneApp(DraftApp(service, KeyRing({"a-long-key": "a"}).tenant))
        server = uvicorn.Server(http_config(app, port=0, log_config=None, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield "127.0.0.1", server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        thread.join(30)


def test_an_offer_to_upgrade_changes_nothing(address: tuple[str, int]) -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAA")
    again = b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
    assert answers(address, post(OPEN, BODY, KEY, *offer) + again, seconds=120) == [
        200,
        200,
    ]  # compiles first
    assert answers(address, post(OPEN, again, KEY, *offer), seconds=2) == [400]
    assert answers(address, post(OPEN, again, *offer) + again, seconds=2) == [401, 200]


def test_old_clients_and_heads(address: tuple[str, int]) -> None:
    got = exchange(address, post(OPEN, BODY, KEY, version="1.0"))
    assert got.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in got.lower()
    url = f"http://{address[0]}:{address[1]}"
    for path in ("/health", "/v1/draft", "/nothing"):
        whole, head = (
            httpx.request(method, url + path, headers={"Authorization": "Bearer a-long-key"})
            for method in ("GET", "HEAD")
        )
        assert (head.status_code, head.content) == (whole.status_code, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]
    assert exchange(address, b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000)[:12] in (b"HTTP/1.1 431", b"")


@pytest.mark.parametrize(
    ("header", "named"),
    [
        ("Content-Type: text/plain", b"Content-Type"),
        ("Content-Type: application/json; charset=utf-16", b"charset"),
        ("Content-Encoding: gzip", b"Content-Encoding"),
        ("Content-Encoding: br", b"Content-Encoding"),
    ],
)
@pytest.mark.parametrize("path", [OPEN, "/v1/draft/step"])
def test_a_body_that_is_not_read_is_refused_by_its_header(
    address: tuple[str, int], header: str, named: bytes, path: str
) -> None:
    got = exchange(address, post(path, gzip.compress(b"{}"), KEY, header), seconds=2)
    assert got.startswith(b"HTTP/1.1 415")
    assert named in got


@pytest.mark.parametrize(
    "body",
    [{"prompt": [True]}, {"prompt": [1], "nodes": True}, {"prompt": [-1]}, {"prompt": []},
     {"prompt": [1], "floor": True},
     {"prompt": [1], "references": [["a"]]}, {"prompt": [1], "other": 1},
     {"prompt": [1], "nodes": 1 << 40}, []],
)  # fmt: skip
def test_what_is_wrong_is_refused(address: tuple[str, int], body: object) -> None:
    assert answers(address, post(OPEN, body, KEY), seconds=2) == [400]
