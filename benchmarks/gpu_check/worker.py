"""The child process: runs parts on command, and writes their reports."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import traceback
from typing import Any

from benchmarks.gpu_check.report import Box, NotThere, Report

__all__ = ["end_with_parent", "serve"]

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Has the kernel kill this process when its parent ends: no orphan holds the card."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(options: Any) -> int:
    """Reads ``NAME SECONDS`` lines from stdin, and answers each on the original stdout after the part."""
    end_with_parent()
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries may print to stdout
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    from benchmarks.gpu_check.setting import Setting

    setting = None
    for line in sys.stdin:
        name, seconds = line.split()
        report, box = Report(options.parts_folder, name, float(seconds)), Box(float(seconds))
        sound = True
        try:
            if setting is None:
                setting = Setting.of(options)
            importlib.import_module(f"benchmarks.gpu_check.{name}").run(setting, box, report)
            report.end("cut" if box.left < 0 else "done")
        except NotThere as reason:
            report.note(str(reason))
            report.end("not there")
        except Exception as error:
            traceback.print_exc()
            report.put(traceback=traceback.format_exc(limit=-12))
            report.fail(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
            report.end("failed")
            sound = setting is not None and setting.is_sound()
        os.write(answers, f"done {name}\n".encode())
        if not sound:
            return 3  # after a CUDA error nothing works in this process
    return 0
