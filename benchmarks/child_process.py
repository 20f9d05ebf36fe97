"""The end of processes that benchmarks start."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import Any

__all__ = ["end_process", "stop_process"]


def stop_process(process: subprocess.Popen[Any], seconds: float = 30.0) -> int:
    """Asks a process to stop, and returns its exit code; it is killed if it has none in time."""
    with suppress(ProcessLookupError):
        process.terminate()
    return end_process(process, seconds)


def end_process(process: subprocess.Popen[Any], seconds: float) -> int:
    """The exit code of a process, which is killed if it has none in time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
    return process.returncode
