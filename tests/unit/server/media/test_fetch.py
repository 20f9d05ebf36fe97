"""Fetching: only from public addresses, however they are written, in limited time and size."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.fetch import Fetcher, is_public


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
        "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1",
        "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::7f00:1",
        "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::", "2001:db8::1", "2001:0:1:1::1", "", "host",
    ],
)  # fmt: skip
def test_other_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@contextmanager
def listening(answer: Callable[[socket.socket, bytes], None]) -> Iterator[tuple[int, list[bytes]]]:
    """A port that answers each connection's first bytes; and the bytes."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            while True:
                try:
                    sock, _ = server.accept()
                except OSError:
                    return
                with sock:
                    seen.append(sock.recv(65536))
                    with suppress(OSError):
                        answer(sock, seen[-1])

        threading.Thread(target=run, daemon=True).start()
        yield server.getsockname()[1], seen
        server.shutdown(socket.SHUT_RDWR)


class Trusting(Fetcher):
    """Takes one loopback address for a public one, and names for what a test says."""

    def __init__(self, max_bytes: int = 1000, seconds: float = 5.0, **names: Sequence[str]) -> None:
        super().__init__(max_bytes, seconds)
        self.names, self.asked = names, list[str]()

    def resolve(self, host: str, port: int, end: float) -> Sequence[str]:
        self.asked.append(host)
        return self.names[host] if host in self.names else super().resolve(host, port, end)

    def allows(self, address: str) -> bool:
        return address == "127.0.0.1" or super().allows(address)


def said(content: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n{lines}\r\n".encode() + content


def test_a_file_of_an_allowed_host() -> None:
    with listening(lambda sock, _: sock.sendall(said(b"abc"))) as (port, seen):
        assert Trusting(images=["127.0.0.1"]).get(f"http://images:{port}/a?b=c#d") == b"abc"
    assert seen[0].startswith(b"GET /a?b=c HTTP/1.1\r\n")
    assert f"Host: images:{port}".encode() in seen[0]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.1",
        "0", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "127.0.0.1.",
        "169.254.169.254", "[fe80::1%25lo]", "%31%32%37.0.0.1", "\uff11\uff12\uff17.0.0.1",
    ],
)  # fmt: skip
def test_private_addresses_in_any_form_are_never_reached(host: str) -> None:
    answered = listening(lambda sock, _: sock.sendall(said(b"secret")))
    with answered as (port, seen), pytest.raises(ApiError) as refused:
        Fetcher(1000, 5.0).get(f"http://{host}:{port}/")
    assert refused.value.status == 400
    assert seen == []


def test_names_that_lead_to_private_addresses_even_among_others() -> None:
    with listening(lambda sock, _: sock.sendall(said(b"secret"))) as (port, seen):
        for addresses in (["10.0.0.1"], ["8.8.8.8", "192.168.0.1"], ["::1"], []):
            with pytest.raises(ApiError, match="no public address"):
                Trusting(evil=addresses).get(f"http://evil:{port}/")
    assert seen == []


def test_the_checked_address_is_the_one_that_is_reached() -> None:
    """A name that is resolved twice could have another answer the second time."""

    class Once(Trusting):
        def resolve(self, host: str, port: int, end: float) -> Sequence[str]:
            self.asked.append(host)
            return ["127.0.0.1"] if len(self.asked) == 1 else ["10.0.0.1"]

    with listening(lambda sock, _: sock.sendall(said(b"abc"))) as (port, _):
        fetcher = Once()
        assert fetcher.get(f"http://rebinds.invalid:{port}/") == b"abc"
    assert fetcher.asked == ["rebinds.invalid"]


@pytest.mark.parametrize(
    "where",
    [
        "http://10.0.0.1/", "http://[::1]/", "https://169.254.169.254/latest", "file:///etc/passwd",
        "//192.168.0.1/", "ftp://127.0.0.1/", "http://user@10.0.0.1/", "gopher://127.0.0.1:70/",
    ],
)  # fmt: skip
def test_redirects_are_checked_as_first_addresses_are(where: str) -> None:
    answer = said(b"", "302 Found", Location=where)
    with listening(lambda sock, _: sock.sendall(answer)) as (port, seen), pytest.raises(ApiError):
        Trusting(images=["127.0.0.1"]).get(f"http://images:{port}/")
    assert len(seen) == 1


def test_redirects_end_somewhere() -> None:
    def answer(sock: socket.socket, asked: bytes) -> None:
        turn = asked.split()[1].count(b"x")
        sock.sendall(said(b"abc") if turn == most else said(b"", "301", Location="/" + "x" * (turn + 1)))

    with listening(answer) as (port, _):
        most = 3
        assert Trusting(images=["127.0.0.1"]).get(f"http://images:{port}/") == b"abc"
        most = 4
        with pytest.raises(ApiError, match="redirected more than 3 times"):
            Trusting(images=["127.0.0.1"]).get(f"http://images:{port}/")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (said(b"a" * 1001), "more than 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"200\r\n" + b"a" * 512 + b"\r\n"
         + b"200\r\n" + b"a" * 512 + b"\r\n0\r\n\r\n", "more than 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "not whole"),
        (said(b"", "404 Not Found"), "answers 404"),
        (said(b"abc", Content_Encoding="gzip"), "compressed"),
        (b"rubbish\r\n\r\n", "not whole"),
        (b"", "not whole"),
    ],
)  # fmt: skip
def test_answers_that_are_refused(answer: bytes, why: str) -> None:
    with listening(lambda sock, _: sock.sendall(answer)) as (port, _), pytest.raises(ApiError, match=why):
        Trusting(images=["127.0.0.1"]).get(f"http://images:{port}/")


def test_slow_servers_are_given_up_whatever_they_are_slow_with() -> None:
    def drips(head: bytes) -> Callable[[socket.socket, Any], None]:
        def answer(sock: socket.socket, _: Any) -> None:
            sock.sendall(head)
            for _turn in range(100):
                sock.sendall(b"a")
                time.sleep(0.05)

        return answer

    for head in (b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"):
        with listening(drips(head)) as (port, _):
            began = time.monotonic()
            with pytest.raises(ApiError, match="was not received"):
                Trusting(seconds=0.4, images=["127.0.0.1"]).get(f"http://images:{port}/")
            assert time.monotonic() - began < 3


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: Any) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [time.sleep(2)][:0])
    began = time.monotonic()
    with pytest.raises(ApiError, match="no public address"):
        Fetcher(1000, 0.2).get("http://slow.invalid/")
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    "url", ["http://", "http://a:b@c/", "http://a b/", "http://a:99999/", "http://\n/", "x"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ApiError):
        Fetcher(1000, 1.0).get(url)
