"""A plugin of pytest that writes each test's outcome at once, as a line of JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["FILE", "read_outcomes"]

FILE = "GPU_CHECK_OUTCOMES"
"""Name of the environment variable with the path of the file."""


def _write(**line: Any) -> None:
    with Path(os.environ[FILE]).open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_finish(session: Any) -> None:
    """Writes the number of tests to run."""
    _write(tests=len(session.items))


def pytest_runtest_logreport(report: Any) -> None:
    """Writes the outcome of a test, once: of its call, or of a failed set-up or tear-down."""
    if report.when != "call" and report.passed:
        return
    message = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash is not None else report.longrepr)
    _write(
        name=report.nodeid.split("::")[-1],
        outcome=report.outcome,
        seconds=round(report.duration, 2),
        message=(message.splitlines() or [""])[0][:200],
        positions=[[name, value] for name, value in report.user_properties if isinstance(value, int)],
    )


def read_outcomes(path: Path) -> dict[str, Any]:
    """Tests by outcome, judged tokens by verdict, the first line of each failure, and the slowest tests.

    `tests` is the number to run; the last line may be incomplete.
    """
    counts: Counter[str] = Counter()
    positions: Counter[str] = Counter()
    failed: dict[str, str] = {}
    seconds: Counter[str] = Counter()
    tests = 0
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "tests" in line:
            tests = line["tests"]
            continue
        counts[line["outcome"]] += 1
        seconds[line["name"]] += line["seconds"]
        if line["outcome"] == "failed":
            failed[line["name"]] = line["message"]
        for name, value in line["positions"]:
            positions[name] += value
    return {
        "tests": tests,
        "counts": dict(counts),
        "positions": dict(positions),
        "failed": failed,
        "slowest": dict(seconds.most_common(8)),
    }
