"""Runs of all parts in a worker process, and the summary table."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu_check.report import read_parts, write_json, write_text
from benchmarks.gpu_check.supervisor import Worker
from benchmarks.gpu_check.table import make_table, reasons

__all__ = ["PARTS", "main"]

PARTS = {
    "facts": 5.0,
    "tests": 50.0,
    "races": 38.0,
    "attention": 12.0,
    "passes": 36.0,
    "anatomy": 36.0,
    "speed": 85.0,
    "half_precision": 40.0,
}
"""The parts in order, and each one's share of the time; unused time goes to later parts."""

_TINY_SHARES = {"tests": 200.0, "races": 120.0, "speed": 90.0}
"""Shares of a rehearsal, in which starting processes takes longest."""

_GRACE = 12.0
"""Seconds over its time in which a part may finish its running case; then it is killed."""

_TINY_GRACE = 120.0
"""The same in a rehearsal, on a machine that may be busy."""

_RESERVE = 0.03
"""Share of the time that no part gets: for the last one to finish, and for printing."""

_TINY_LEAST = 30.0
"""Seconds that every part of a rehearsal has."""

_WARM_UP = "warm_up"
_COLD = {"facts", "attention", "races"}
"""Parts without drafts or without timings: no kernel needs to be compiled for them beforehand."""

FAULTS = ("wrong_mask", "late_copy")


class _Stopped(BaseException):
    """Request to end the process."""


def main(arguments: list[str]) -> int:
    """Runs the check: 0 where all parts ran without a failure, 1 otherwise."""
    options = _parse(arguments)
    if options.worker:
        from benchmarks.gpu_check.worker import serve

        return serve(options)
    out: Path = options.out
    parts_folder: Path = options.parts_folder
    for stale in (out / "results.json", out / "table.txt", *parts_folder.glob("*.json")):
        stale.unlink(missing_ok=True)
    parts_folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in PARTS if name in options.parts]
    signal.signal(signal.SIGTERM, _stop)
    stopped, began = None, time.monotonic()
    try:
        _run(options, names, parts_folder, began)
    except (_Stopped, KeyboardInterrupt) as error:
        stopped = f"stopped by {error}" if str(error) else "interrupted"
    return _finish(options, names, stopped, time.monotonic() - began)


def _parse(arguments: list[str]) -> Any:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu_check", description=__doc__)
    parser.add_argument("--seconds", type=float, default=520.0, help="time for all parts together")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, table.txt, parts/")
    parser.add_argument("--parts-folder", type=Path, help="where each part writes; DIR/parts without")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a rehearsal")
    parser.add_argument("--parts", type=_names, default=list(PARTS), help=f"by commas, of {', '.join(PARTS)}")
    parser.add_argument("--fault", choices=FAULTS, help="break something on purpose, to see it noticed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.parts_folder is None:
        options.parts_folder = options.out / "parts"
    if options.seconds <= 0:
        parser.error(f"--seconds is {options.seconds:g}; it must be positive")
    return options


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"unknown part {', '.join(unknown) or 'none'}; parts: {', '.join(PARTS)}"
        )
    return names


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped(signal.Signals(number).name)


def _run(options: Any, names: list[str], folder: Path, began: float) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu_check", "--worker", "--out", str(options.out)]
    command += ["--parts-folder", str(folder)]
    command += ["--device", options.device, "--parts", ",".join(names)]
    command += ["--tiny"] if options.tiny else []
    command += ["--fault", options.fault] if options.fault else []

    def keep() -> None:
        _results(options, names, None, time.monotonic() - began)

    shares = {**PARTS, **(_TINY_SHARES if options.tiny else {})}
    with Worker(command, folder, keep) as worker:
        if _WARM_UP in _all(names):
            worker.run(_WARM_UP, options.seconds / 4, options.seconds / 4 + _grace(options))
        for index, name in enumerate(names):
            left = options.seconds - (time.monotonic() - began)
            usable = max(left - _RESERVE * options.seconds, 0.0)
            seconds = usable * shares[name] / sum(shares[other] for other in names[index:])
            _say(f"{name}: {seconds:.0f} s of {left:.0f} s left")
            if options.tiny:  # a rehearsal runs everything, even on a busy machine
                seconds = max(seconds, _TINY_LEAST)
            limit = seconds + _grace(options)
            worker.run(name, seconds, limit if options.tiny else min(limit, max(left, 1.0)))
            keep()


def _all(names: list[str]) -> list[str]:
    """The parts with the ones they depend on before them."""
    return names if _COLD.issuperset(names) else [_WARM_UP, *names]


def _grace(options: Any) -> float:
    return _TINY_GRACE if options.tiny else _GRACE


def _results(options: Any, names: list[str], stopped: str | None, seconds: float) -> dict[str, Any]:
    parts = read_parts(options.parts_folder, _all(names))
    why = reasons(parts, _all(names)) + ([stopped] if stopped else [])
    result = {
        "ok": not why,
        "failures": why,
        "device": options.device,
        "tiny": options.tiny,
        "fault": options.fault,
        "seconds": round(seconds, 1),
        "parts": parts,
    }
    write_json(options.out / "results.json", result)
    return result


def _finish(options: Any, names: list[str], stopped: str | None, seconds: float) -> int:
    result = _results(options, names, stopped, seconds)
    why = result["failures"]
    table = make_table(result["parts"])
    last = f"FAILED: {'; '.join(why)}" if why else "OK"
    write_text(options.out / "table.txt", f"{table}\n{last}\n")
    print(table)
    print(last, flush=True)
    return 1 if why else 0


def _say(text: str) -> None:
    print(f"[gpu_check] {text}", file=sys.stderr, flush=True)
