"""HTTP as it comes: offers to upgrade, old versions, wrong framing, heads without end."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from retrieval_draft.http import protocol as http_protocol
from tests.support.raw_http import answers, exchange, post
from tests.support.servers import MODEL, Running, serving, tiny_drafter, tiny_model, tiny_tokenizer

QUESTION = {"model": MODEL, "prompt": "ab cd", "max_tokens": 3, "temperature": 0}
PATH = "/v1/completions"
OFFER = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
CLOSE = "Connection: close"
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: test\r\n\r\n"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    tokenizer = tiny_tokenizer()
    drafter = tiny_drafter(tiny_model(tokenizer), tokenizer)
    with serving(drafter, tokenizer, max_batch=4) as made:
        yield made


@pytest.fixture
def address(running: Running) -> tuple[str, int]:
    return running.host, running.port


def chunked(path: str, content: bytes, *headers: str) -> bytes:
    head = post(path, b"", "Transfer-Encoding: chunked", *headers, framing=False)
    middle = len(content) // 2
    parts = [content[:middle], content[middle:], b""]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("offer", [OFFER, ("Connection: upgrade", "Upgrade: websocket"), ()])
def test_an_offer_to_upgrade_changes_nothing(address: Any, offer: tuple[str, ...], stream: bool) -> None:
    content = json.dumps({**QUESTION, "stream": stream}).encode()
    whole = post(PATH, content, *offer)
    assert answers(address, whole, seconds=2) == [200]
    assert answers(address, chunked(PATH, content, *offer), seconds=2) == [200]
    # In pieces of any size, with a request behind it.
    size = len(whole) - len(content)
    pieces = [whole[: size - 3], whole[size - 3 : size + 5], whole[size + 5 :] + SMUGGLED]
    assert answers(address, *pieces, seconds=2) == [200, 200]


def test_a_body_behind_a_declined_upgrade_is_no_request(address: Any) -> None:
    # A body that is a request: refused as a body, and never answered as one.
    assert answers(address, post(PATH, SMUGGLED, *OFFER), seconds=2) == [400]
    assert answers(address, chunked(PATH, SMUGGLED, *OFFER), seconds=2) == [400]
    got = exchange(
        address,
        b"GET /health HTTP/1.1\r\nHost: test\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        seconds=1,
    )
    assert got.startswith(b"HTTP/1.1 200")


def test_there_is_no_way_through(address: Any) -> None:
    got = exchange(address, b"CONNECT other:443 HTTP/1.1\r\nHost: other\r\n\r\n" + SMUGGLED, seconds=2)
    assert got.startswith(b"HTTP/1.1 400")
    assert got.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "framing",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: -1"],
        ["Content-Length: 0x5"],
        ["Content-Length: 5, 5"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding: gzip"],
        ["Content-Length : 5"],
    ],
)
@pytest.mark.parametrize("offer", [OFFER, ()])
def test_a_body_of_two_lengths_ends_the_connection(address: Any, framing: list[str], offer: Any) -> None:
    got = answers(address, post(PATH, b"0\r\n\r\n" + SMUGGLED, *offer, *framing, framing=False), seconds=2)
    assert len(got) == 1
    assert 400 <= got[0] < 500


def test_what_is_no_http_is_refused_in_json_and_behind_what_is_asked(address: Any) -> None:
    head, _, body = exchange(address, b"\x16\x03\x01 what\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == 400
    # Not in the middle of a stream that is on its way.
    stream = post(PATH, {**QUESTION, "stream": True, "max_tokens": 64, "ignore_eos": True})
    got = exchange(address, stream + b"\x16\x03\x01 what\r\n\r\n")
    assert got.count(b"HTTP/1.1 ") == 1
    assert got.rstrip().endswith(b"0")
    assert b"[DONE]" in got


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_no_chunks(address: Any, stream: bool) -> None:
    got = exchange(address, post(PATH, {**QUESTION, "stream": stream}, version="1.0"))
    head, _, body = got.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    if stream:
        lines = [line for line in body.split(b"\n") if line]
        assert all(line.startswith(b"data: ") for line in lines)
        assert lines[-1] == b"data: [DONE]"
    else:
        assert json.loads(body)["choices"]


@pytest.mark.parametrize(
    "path", ["/health", "/v1/models", f"/v1/models/{MODEL}", "/openapi.json", "/nothing"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_http_1_0_and_head_wherever_there_is_get(
    address: Any, running: Running, path: str, method: str
) -> None:
    expected = httpx.get(running.url + path)
    found = httpx.request(method, running.url + path)
    assert found.status_code == expected.status_code
    assert found.headers["content-length"] == expected.headers["content-length"]
    assert found.content == (b"" if method == "HEAD" else expected.content)
    got = exchange(address, f"{method} {path} HTTP/1.0\r\n\r\n".encode())
    assert b"transfer-encoding" not in got.lower()
    assert got.partition(b"\r\n\r\n")[2] == found.content


def test_head_of_what_is_posted_is_refused_without_a_body(address: Any) -> None:
    got = exchange(address, b"HEAD /v1/completions HTTP/1.1\r\nHost: test\r\n\r\n" + SMUGGLED, seconds=2)
    assert got.startswith(b"HTTP/1.1 405")
    assert got.count(b"HTTP/1.1 ") == 2


def test_a_client_may_wait_to_be_told_to_go_on(address: Any) -> None:
    content = json.dumps(QUESTION).encode()
    got = exchange(address, post(PATH, content, "Expect: 100-continue", CLOSE))
    assert got.startswith(b"HTTP/1.1 100 ")
    assert b"HTTP/1.1 200" in got


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({}, "Content-Type"),
        ({"Content-Type": "text/plain"}, "Content-Type"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "Content-Type"),
        ({"Content-Type": "application/json; charset=utf-16"}, "charset"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "Content-Encoding"),
        ({"Content-Type": "application/json", "Content-Encoding": "deflate"}, "Content-Encoding"),
        ({"Content-Type": "application/json", "Content-Encoding": "identity, br"}, "Content-Encoding"),
    ],
)
@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
def test_a_body_that_is_not_read_is_refused_by_its_header(
    running: Running, headers: dict[str, str], named: str, path: str
) -> None:
    body = json.dumps(QUESTION).encode()
    body = gzip.compress(body) if "Content-Encoding" in headers else body
    response = httpx.post(running.url + path, content=body, headers=headers)
    assert response.status_code == 415
    assert named in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=UTF-8", 'Application/JSON;charset="utf8"']
)
def test_json_is_read(running: Running, kind: str) -> None:
    headers = {"Content-Type": kind, "Content-Encoding": "identity"}
    assert httpx.post(running.url + PATH, content=json.dumps(QUESTION), headers=headers).status_code == 200


def test_a_head_without_end_is_refused(address: Any) -> None:
    block = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(100))
    got = exchange(address, b"GET /health HTTP/1.1\r\n" + block)
    assert got.startswith(b"HTTP/1.1 431") or not got  # closed while it was still sending
    assert exchange(address, b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000)[:12] in (b"HTTP/1.1 431", b"")
    assert exchange(address, b"GET /" + b"a" * 100_000)[:12] in (b"HTTP/1.1 431", b"")
    assert (
        exchange(address, b"GET /health HTTP/1.1\r\nX: " + b"a" * 60_000 + b"\r\n\r\n", seconds=2)[:12]
        == b"HTTP/1.1 200"
    )


@pytest.mark.parametrize(
    "sent", [b"", b"GET /heal", b"\r\n", b"GET /health HTTP/1.1\r\nHost: test\r\n\r\nGET /he"]
)
def test_a_head_has_its_time(address: Any, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.5)
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        while time.monotonic() - began < 8:
            time.sleep(0.2)
            try:
                connection.sendall(b"\r\n" if sent in (b"", b"\r\n") else b"a")  # a little, again and again
            except OSError:
                break
        assert time.monotonic() - began < 5
