"""A process that runs parts, and is replaced when it hangs or dies: a CUDA error ends its part only."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.gpu_check.report import write_json

__all__ = ["Worker"]


class Worker:
    """Runs parts by name in a child process.

    Args:
        command: Starts the child. It reads lines ``NAME SECONDS`` and answers each with a line when done.
        folder: Folder of the parts' reports.
        tick: Called every other second while a part runs.
    """

    def __init__(self, command: Sequence[str], folder: Path, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._command = list(command)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def run(self, name: str, seconds: float, limit: float) -> None:
        """Runs a part, and kills the child if it far exceeds its time.

        Args:
            name: Of the part.
            seconds: Its box.
            limit: Seconds after which it is killed.
        """
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{name} {seconds:.2f}\n".encode())
            process.stdin.flush()
        end = time.monotonic() + limit
        ready: list[Any] = []
        while not ready and time.monotonic() < end:
            ready, _, _ = select.select([process.stdout], [], [], min(2.0, max(0.0, end - time.monotonic())))
            if not ready:
                self._tick()
        if ready and os.read(process.stdout.fileno(), 4096):
            return
        if ready:
            code = process.wait()
            self._process = None
            self._mark(name, f"the process died with exit code {code}")
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGUSR1)  # prints where each thread is
            time.sleep(0.5)
        self._kill()
        self._mark(name, f"killed after {limit:.0f} s, {seconds:.0f} were its time")

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _mark(self, name: str, reason: str) -> None:
        """Records in the part's report that it did not end by itself; its rows stay."""
        path = self._folder / f"{name}.json"
        data: dict[str, Any] = {"part": name, "rows": [], "failures": []}
        if path.exists():
            data = json.loads(path.read_text())
        data["status"] = "failed"
        data["failures"].append(reason)
        write_json(path, data)
        print(f"[gpu_check] {name}: {reason}", file=sys.stderr, flush=True)
