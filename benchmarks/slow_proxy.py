"""A TCP proxy that simulates a slow, silent or refusing network."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import deque
from contextlib import suppress

__all__ = ["SlowProxy"]

_CHUNK = 1 << 16


class SlowProxy:
    """Forwards data in both directions with a delay of `delay` seconds, in order.

    Args:
        target: Port on loopback to connect to.
        delay: Seconds each way; it may be changed at any time.
        tls: TLS context for clients; None for plain connections.

    Attributes:
        port: Port for clients.
        frozen: No data is forwarded while it is set.
        refusing: Connections are closed, and new ones too.
    """

    def __init__(self, target: int, delay: float = 0.0, tls: ssl.SSLContext | None = None) -> None:
        self.delay = delay
        self.frozen = False
        self.refusing = False
        self._target = target
        self._tls = tls
        self._closed = False
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self, refusing: bool = True) -> None:
        """Closes all connections, and new ones at once, until called with False."""
        self.refusing = refusing
        if refusing:
            self._drop()

    def close(self) -> None:
        """Ends the proxy and its connections."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else the waiting thread accepts one more
        self._listener.close()
        self._drop()

    def __enter__(self) -> SlowProxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _refuses(self) -> bool:
        return self.refusing or self._closed

    def _drop(self) -> None:
        for each in list(self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = None
        try:
            self._sockets.add(client)  # before the check of refusal: later ones are dropped
            if self._refuses():
                return
            if self._tls is not None:
                self._sockets.discard(client)
                client = self._tls.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
                self._sockets.add(client)
                client.do_handshake()
            server = socket.create_connection(("127.0.0.1", self._target))
            self._sockets.add(server)
            if self._refuses():
                return
            back = threading.Thread(target=self._pump, args=(server, client), daemon=True)
            back.start()
            self._pump(client, server)
            back.join()
        except OSError:
            pass
        finally:
            for each in (client, server):
                if each is not None:
                    self._sockets.discard(each)
                    each.close()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        """Forwards until one side closes; reading continues while chunks wait for their time."""
        waiting: deque[tuple[float, bytes]] = deque()
        changed = threading.Condition()

        def write() -> None:
            with suppress(OSError):
                while True:
                    with changed:
                        changed.wait_for(lambda: waiting)
                        due, chunk = waiting.popleft()
                    while due > time.monotonic() or (self.frozen and not self._closed):
                        time.sleep(min(0.005, max(0.0, due - time.monotonic())) or 0.005)
                    if not chunk:
                        target.shutdown(socket.SHUT_WR)
                        return
                    target.sendall(chunk)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        chunk = b"?"
        while chunk:
            try:
                chunk = source.recv(_CHUNK)
            except OSError:
                chunk = b""
            with changed:
                waiting.append((time.monotonic() + self.delay, chunk))
                changed.notify()
        writer.join()
