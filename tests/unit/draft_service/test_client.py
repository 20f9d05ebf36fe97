from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from retrieval_draft.draft_service import wire
from retrieval_draft.draft_service.client import DraftClient
from retrieval_draft.draft_service.errors import (
    NotAllowedError,
    OutOfStepError,
    ServiceUnavailableError,
    UnknownSessionError,
)
from retrieval_draft.draft_service.transport import Address
from retrieval_draft.errors import InvalidInputError

Answer = Callable[[bytes, bytes], "bytes | None"]
"""(path, body) to the bytes that are sent; None hangs up."""


def reply(message: object, status: int = 200, extra: str = "") -> bytes:
    body = wire.encode(message)  # type: ignore[arg-type]
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


OPENED = reply(wire.OpenReply("s", wire.Draft(length=1)))


def drafts(*found: wire.Draft) -> bytes:
    return reply(wire.StepReply(list(found)))


def steps_of(body: bytes) -> list[wire.Step]:
    return wire.decode(body, wire.StepRequest).steps


@contextmanager
def scripted(answer: Answer) -> Iterator[tuple[str, list[int]]]:
    """A server that says what the script says; its address, and the number of connections so far."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[int] = []
    held: list[socket.socket] = []

    def talk(peer: socket.socket) -> None:
        with peer:
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    more = peer.recv(65536)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                while len(data) < length:
                    data += peer.recv(65536)
                response = answer(head.split()[1], data[:length])
                data = data[length:]
                if response is None:
                    return
                peer.sendall(response)

    def accept() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            connections.append(1)
            held.append(peer)
            threading.Thread(target=_quietly, args=(talk, peer), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for peer in held:
            peer.close()
        thread.join(5)


def _quietly(talk: Callable[[socket.socket], None], peer: socket.socket) -> None:
    with suppress(OSError):
        talk(peer)


def test_tokens_may_be_arrays_and_connections_are_reused() -> None:
    seen: list[wire.Step] = []

    def answer(path: bytes, body: bytes) -> bytes:
        if path.endswith(b"open"):
            assert wire.decode(body, wire.OpenRequest).prompt == [4, 5]
            return OPENED
        seen.extend(steps_of(body))
        return drafts(wire.Draft([9, 3], [-1, 0], [1.0, 0.5], accepted=1, length=4))

    with scripted(answer) as (url, connections), DraftClient(url) as client:
        session = client.open(np.array([4, 5]))
        draft = session.step(np.array([8, 9]), nodes=3, max_depth=2, chain=True, min_prob=0.5)
        assert (draft.tokens, draft.accepted, draft.num_draft_tokens) == ([9, 3], 1, 1)
        assert seen == [
            wire.Step(session="s", tokens=[8, 9], at=2, nodes=3, max_depth=2, chain=True, min_prob=0.5)
        ]
        session.close()
        assert seen[-1] == wire.Step(session="s", at=4, nodes=0, close="finished")
        session.close()
        assert len(seen) == 2
        assert len(connections) == 1


def test_a_service_that_never_answers_costs_the_timeout_once() -> None:
    over = threading.Event()

    def answer(path: bytes, body: bytes) -> bytes | None:
        if path.endswith(b"open"):
            return OPENED
        over.wait(20)
        return None

    with scripted(answer) as (url, _):
        with DraftClient(url, timeout=0.2, on_error="empty", retry_seconds=60) as client:
            session = client.open([4, 5])
            begin = time.monotonic()
            for token in range(50):
                draft = session.step([token])
                assert (draft.tokens, draft.parents, draft.num_draft_tokens) == ([token], [-1], 0)
            assert client.open([1]).step([2]).tokens == [2]
            session.close()
            assert time.monotonic() - begin < 5
            assert client.failures == 1
            assert session.length == 52
        with DraftClient(url, timeout=0.2) as client, pytest.raises(ServiceUnavailableError, match="answer"):
            client.open([4, 5]).step([1])
        over.set()


def test_tokens_of_failed_steps_are_sent_with_the_next() -> None:
    seen: list[wire.Step] = []

    def answer(path: bytes, body: bytes) -> bytes | None:
        if path.endswith(b"open"):
            return OPENED
        seen.extend(steps_of(body))
        return None if len(seen) in (2, 3) else drafts(wire.Draft(length=9))

    with scripted(answer) as (url, _), DraftClient(url, on_error="empty", retry_seconds=0) as client:
        session = client.open([4])
        for token in (10, 11, 12):
            session.step([token])
        assert client.failures == 1
        # The second is tried on the kept connection and on a new one, then waits for the third.
        assert [(step.at, step.tokens) for step in seen] == [(1, [10]), (2, [11]), (2, [11]), (2, [11, 12])]
        assert session.alive


@pytest.mark.parametrize("on_error", ["raise", "empty"])
def test_a_session_that_is_gone_stays_gone(on_error: str) -> None:
    calls = []

    def answer(path: bytes, body: bytes) -> bytes:
        if path.endswith(b"open"):
            return OPENED
        calls.append(1)
        return reply(wire.ErrorReply(wire.Failure("gone", code=404)), 404)

    with scripted(answer) as (url, _), DraftClient(url, on_error=on_error) as client:  # type: ignore[arg-type]
        session = client.open([4])
        for _ in range(3):
            if on_error == "raise":
                with pytest.raises(UnknownSessionError):
                    session.step([5])
            else:
                assert session.step([5]).tokens == [5]
        assert not session.alive
        session.close()
        assert len(calls) == 1, "a session that is gone is not asked about again"


def test_a_batch_goes_on_where_one_fails() -> None:
    def answer(path: bytes, body: bytes) -> bytes:
        if path.endswith(b"open"):
            return OPENED
        failed = wire.Draft(error=wire.Failure("out of step", code=409))
        good = wire.Draft([6, 1], [-1, 0], [1.0, 0.5])
        return drafts(*([failed, good] if len(steps_of(body)) == 2 else [good]))

    with scripted(answer) as (url, _), DraftClient(url) as client:
        bad, good = client.open([4]), client.open([4])
        first, second = client.step([(bad, [5]), (good, [6])])
        assert first.error is not None
        assert first.tokens == [5]
        assert second.tokens == [6, 1]
        assert not bad.alive
        first, second = client.step([(bad, [7]), (good, [6])])
        assert (first.tokens, second.tokens) == ([7], [6, 1])
        assert client.step([]) == []


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", ServiceUnavailableError, "no HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\n", ServiceUnavailableError, "length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", ServiceUnavailableError, "no drafting service"),
        (b"HTTP/1.1 502 X\r\nContent-Length: 4\r\n\r\n<h1>", ServiceUnavailableError, "status 502"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nhi", ServiceUnavailableError, "longer"),
        (b"x" * 100_000, ServiceUnavailableError, "header"),
        (reply(wire.ErrorReply(wire.Failure("no key", code=401)), 401), NotAllowedError, "no key"),
        (reply(wire.ErrorReply(wire.Failure("other", code=409)), 409), OutOfStepError, "other"),
    ],
)
def test_what_answers_is_told(response: bytes, error: type[Exception], message: str) -> None:
    with scripted(lambda path, body: response) as (url, _):
        with DraftClient(url, timeout=2) as client, pytest.raises(error, match=message):
            client.open([1])
        with DraftClient(url, timeout=2, on_error="empty") as client:
            assert client.open([1]).step([3]).tokens == [3]


def test_a_connection_that_the_service_closed_is_made_again() -> None:
    with scripted(lambda path, body: OPENED if path.endswith(b"open") else None) as (url, connections):
        client = DraftClient(url)
        session = client.open([1])
        with pytest.raises(ServiceUnavailableError):
            session.step([2])
        assert len(connections) == 2
        client.open([1])
        client.close()
        with pytest.raises(ServiceUnavailableError, match="closed"):
            client.open([1])
    last = reply(wire.OpenReply("s", wire.Draft()), 200, "Connection: close\r\n")
    with scripted(lambda path, body: last) as (url, connections), DraftClient(url) as client:
        client.open([1])
        client.open([1])
        assert len(connections) == 2


def test_nobody_there(tmp_path: Path) -> None:
    for url in (f"unix://{tmp_path}/none.sock", "http://127.0.0.1:9"):
        with pytest.raises(ServiceUnavailableError, match="does not answer"):
            DraftClient(url).open([1])
        assert DraftClient(url, on_error="empty").open([1]).step([2, 3]).tokens == [3]


def test_addresses() -> None:
    assert Address("unix:///run/a%20b.sock").path == "/run/a b.sock"
    address = Address("https://[::1]/drafts/")
    assert (address.host, address.port, address.prefix, address.secure) == ("::1", 443, "/drafts", True)
    for url in ("", "host:80", "ftp://host", "unix://relative/path", "http://host:port", "http://"):
        with pytest.raises(InvalidInputError, match="no address"):
            Address(url)


def test_refusals() -> None:
    for options in ({"on_error": "ignore"}, {"api_key": "a\r\nb"}, {"api_key": ""}, {"timeout": 0}):
        with pytest.raises(InvalidInputError):
            DraftClient("http://localhost", **options)  # type: ignore[arg-type]
    client = DraftClient("http://localhost")
    with pytest.raises(InvalidInputError, match="empty"):
        client.open([])
    with pytest.raises(InvalidInputError, match="row of ids"):
        client.open(np.array([[1, 2]]))


def test_an_engine_without_torch_can_use_it() -> None:
    code = (
        "import sys; import retrieval_draft.draft_service.client; "
        "print(sorted({'torch', 'numpy', 'transformers', 'uvicorn', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
