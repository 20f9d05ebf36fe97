"""``retrieval-draft serve`` as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.child_process import end_process
from benchmarks.loopback import get_status, got
from retrieval_draft.errors import RetrievalDraftError

__all__ = ["ServeProcess"]

_ADDRESS = re.compile(r"Listening on http://127\.0\.0\.1:(\d+)")
_DATA = re.compile(r"^retrieval_draft:(?:index|prefix_cache)_bytes(?:\{.*\})? (\S+)$", re.MULTILINE)
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class ServeProcess:
    """A server on a free loopback port.

    Args:
        options: Of ``retrieval-draft serve``, address left out.
        seconds: Limit until it is ready.

    Attributes:
        port: Port it listens on.

    Raises:
        RetrievalDraftError: It ended, or is not ready in time.
    """

    def __init__(self, options: Sequence[str], seconds: float = 600.0) -> None:
        command = [sys.executable, "-m", "retrieval_draft.cli", "serve", "--port", "0", *options]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._lines: deque[str] = deque(maxlen=50)
        self._listening = threading.Event()
        self.port = 0
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._wait_ready(time.monotonic() + seconds)
        except BaseException:
            self._process.kill()
            raise

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line.rstrip())
            found = _ADDRESS.search(line)
            if found:
                self.port = int(found[1])
                self._listening.set()

    def _wait_ready(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            if self._listening.wait(0.1) and self.health() == 200:
                return
            time.sleep(0.1)
        raise RetrievalDraftError("The server did not start.", "\n".join([*self._lines][-10:]))

    def health(self) -> int:
        """Status of /health; 0 without an answer."""
        return get_status(self.port)

    @property
    def resident_bytes(self) -> int:
        """Memory of the process; 0 where the system does not report it."""
        try:
            return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * _PAGE
        except (OSError, IndexError, ValueError):
            return 0

    @property
    def data_bytes(self) -> int:
        """Memory of what it drafts from, and of keys and values of earlier texts; 0 without an answer."""
        return round(sum(map(float, _DATA.findall(got(self.port, "/metrics")[1].decode()))))

    def memory_while(self, work: Callable[[int], None], clients: int) -> list[tuple[int, int]]:
        """Runs ``work(number)`` for every client at once.

        Returns:
            `resident_bytes` and `data_bytes`, each second.
        """
        threads = [threading.Thread(target=work, args=(client,)) for client in range(clients)]
        for thread in threads:
            thread.start()
        found = []
        while any(thread.is_alive() for thread in threads):
            found.append((self.resident_bytes, self.data_bytes))
            time.sleep(1.0)
        return found

    def signal(self) -> None:
        """Sends it the signal to stop."""
        self._process.send_signal(signal.SIGTERM)

    def stop(self, seconds: float = 60.0) -> int:
        """Stops it, and returns its exit code."""
        if self._process.poll() is None:
            self.signal()
        return self.wait(seconds)

    def wait(self, seconds: float) -> int:
        """Its exit code; it is killed if it has none in time."""
        return end_process(self._process, seconds)

    @property
    def last_lines(self) -> list[str]:
        """Last lines of its output."""
        return list(self._lines)
