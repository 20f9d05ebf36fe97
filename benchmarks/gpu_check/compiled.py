"""`model.generate` with a static cache and a compiler, in a process that prepares ahead of time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu_check.proc import ROOT

__all__ = ["CompiledStock"]


class CompiledStock:
    """A process that compiles in the background, waits, and measures on request.

    Args:
        case: As `cases.Case`, as plain types.
        device: Device to run on.
        tiny: Whether this is a rehearsal.
    """

    def __init__(self, case: dict[str, Any], device: str, tiny: bool) -> None:
        given = {"case": case, "device": device, "tiny": tiny}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_check.compiled", json.dumps(given)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def measure(self, seconds: float) -> dict[str, Any]:
        """The row that `speed` made there within `seconds`, or the reason that there is none."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write("go\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], seconds)
            line = process.stdout.readline() if ready else ""
            if line:
                row: dict[str, Any] = json.loads(line)
                return row
            code = process.wait(10) if ready else None
        except BrokenPipeError:
            code = process.wait(10)
        finally:
            self.close()
        ended = "not compiled in time" if code is None else f"ended with {code}"
        self._log.seek(0)
        return {"equal": ended, "output": self._log.read().splitlines()[-8:]}

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _child(case: dict[str, Any], device: str, tiny: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from benchmarks.gpu_check.cases import Case
    from benchmarks.gpu_check.setting import Setting
    from benchmarks.gpu_check.speed import measure
    from benchmarks.gpu_check.worker import end_with_parent

    end_with_parent()

    def wait() -> None:
        if not sys.stdin.readline():
            raise SystemExit(3)  # the parent has gone

    setting = Setting.of(SimpleNamespace(device=device, tiny=tiny, fault=None))
    row = measure(setting, Case(**case), wait)
    print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    _child(**json.loads(sys.argv[1]))
