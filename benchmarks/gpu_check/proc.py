"""Child processes that end with their parent and within their time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ROOT", "run_child"]

_GOODBYE = 4.0
"""Seconds that a process has to end after an interrupt."""

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""


def run_child(
    arguments: Sequence[str], seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """Runs this Python with `arguments` in the checkout.

    Returns:
        The exit code, None at a timeout, and the output of both streams.
    """
    child = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=max(seconds, 1.0))
        return child.returncode, output
    except subprocess.TimeoutExpired:
        # pytest writes its results when it is interrupted.
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            child.send_signal(signal.SIGINT)
            child.wait(_GOODBYE)
        _kill_group(child)
        output, _ = child.communicate()
        return None, output
    except BaseException:
        _kill_group(child)
        raise


def _kill_group(child: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
