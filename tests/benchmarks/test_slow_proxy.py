"""Tests of the proxy that makes a network slow, silent or refusing."""

import socket
import threading
import time

import pytest

from benchmarks.slow_proxy import SlowProxy


@pytest.fixture
def echo():
    """A server that sends back what it gets; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            while chunk := connection.recv(1 << 16):
                connection.sendall(chunk)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


@pytest.fixture
def proxy(echo):
    with SlowProxy(echo) as made:
        yield made


def connected(proxy: SlowProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def received(connection: socket.socket, length: int) -> bytes:
    got = b""
    while len(got) < length and (chunk := connection.recv(1 << 16)):
        got += chunk
    return got


def test_each_way_takes_the_delay(proxy) -> None:
    with connected(proxy) as connection:
        connection.sendall(b"a")
        assert received(connection, 1) == b"a"
        proxy.delay = 0.15
        begin = time.monotonic()
        connection.sendall(b"b")
        assert received(connection, 1) == b"b"
        assert 0.3 <= time.monotonic() - begin < 2


def test_waiting_chunks_do_not_hold_up_what_follows(proxy) -> None:
    proxy.delay = 0.1
    with connected(proxy) as connection:
        begin = time.monotonic()
        for number in range(10):
            connection.sendall(bytes([number]))
            time.sleep(0.01)
        assert received(connection, 10) == bytes(range(10))
        assert time.monotonic() - begin < 1  # and not ten times 0.2


def test_the_order_is_kept_when_the_delay_falls(proxy) -> None:
    data = b"".join(number.to_bytes(4, "big") for number in range(1 << 16))
    with connected(proxy) as connection:
        proxy.delay = 0.2
        connection.sendall(data[:1000])
        time.sleep(0.05)
        proxy.delay = 0.0
        sender = threading.Thread(target=connection.sendall, args=(data[1000:],))
        sender.start()
        assert received(connection, len(data)) == data
        sender.join()


def test_nothing_passes_while_it_is_frozen(proxy) -> None:
    with connected(proxy) as connection:
        proxy.frozen = True
        connection.sendall(b"a")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        proxy.frozen = False
        connection.settimeout(5)
        assert received(connection, 1) == b"a"


def test_refusing_ends_connections_and_new_ones(proxy) -> None:
    with connected(proxy) as old:
        old.sendall(b"a")
        assert received(old, 1) == b"a"
        proxy.refuse()
        assert received(old, 1) == b""
        with connected(proxy) as new:
            try:
                new.sendall(b"b")
                assert new.recv(1) == b""
            except ConnectionError:
                pass
        proxy.refuse(False)
        with connected(proxy) as new:
            new.sendall(b"c")
            assert received(new, 1) == b"c"


def test_the_end_of_one_side_is_passed_on(proxy) -> None:
    with connected(proxy) as connection:
        connection.sendall(b"a")
        connection.shutdown(socket.SHUT_WR)
        assert received(connection, 2) == b"a"  # and then the end


@pytest.mark.parametrize("frozen", [False, True])
def test_closed_it_accepts_nobody(proxy, frozen: bool) -> None:
    with connected(proxy) as connection:
        connection.sendall(b"a")
        assert received(connection, 1) == b"a"
        proxy.frozen = frozen
        connection.sendall(b"b" * frozen)
        proxy.close()
        connection.settimeout(5)
        assert received(connection, 10) in (b"", b"b")
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
