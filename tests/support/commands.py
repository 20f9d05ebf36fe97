"""The type of the fixture `command`."""

from __future__ import annotations

from collections.abc import Callable

Command = Callable[..., tuple[int, str, str]]
"""Takes the words of a command line; returns its exit code, stdout and stderr."""
