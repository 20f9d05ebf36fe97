"""Results of a part of the check, on disk after every row."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

__all__ = ["Box", "NotThere", "Report", "read_parts", "write_json", "write_text"]


class NotThere(Exception):
    """Absence of a feature on this machine or in this version of the project; no failure."""


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically, even if the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with `write_text`; other types are written as text, NaN and infinity as null."""
    write_text(path, json.dumps(_plain(value), indent=1, default=str, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_parts(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The reports in `folder` by name, as far as they exist."""
    found = {}
    for name in names:
        path = folder / f"{name}.json"
        try:
            found[name] = json.loads(path.read_text())
        except FileNotFoundError:
            continue
    return found


class Box:
    """The time that a part may take.

    Args:
        seconds: Of it, from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the end, negative after it."""
        return self._end - time.monotonic()

    def has(self, seconds: float) -> bool:
        """True if so much time is left."""
        return self.left >= seconds


class Report:
    """Rows and facts of one part, written to its file after every addition.

    Args:
        folder: Folder of the file.
        name: The part's.
        seconds: Its time box.
    """

    def __init__(self, folder: Path, name: str, seconds: float) -> None:
        self.path = folder / f"{name}.json"
        self._began = time.monotonic()
        self.data: dict[str, Any] = {
            "part": name,
            "status": "running",
            "box": seconds,
            "seconds": 0.0,
            "failures": [],
            "notes": [],
            "rows": [],
        }
        self.flush()

    def flush(self) -> None:
        """Writes the file."""
        self.data["seconds"] = round(time.monotonic() - self._began, 2)
        write_json(self.path, self.data)

    def put(self, **facts: Any) -> None:
        """Adds facts by name."""
        self.data.update(facts)
        self.flush()

    def row(self, **values: Any) -> dict[str, Any]:
        """Adds a row."""
        self.data["rows"].append(values)
        self.flush()
        return values

    def note(self, text: str) -> None:
        """Adds a remark that is no failure."""
        self.data["notes"].append(text)
        self.flush()

    def fail(self, reason: str) -> None:
        """Adds a reason for the result FAILED in the last line."""
        self.data["failures"].append(reason)
        self.flush()

    def end(self, status: str) -> None:
        """Closes the report: "done", "cut" at the end of its time, or "failed"."""
        self.data["status"] = status
        self.flush()
