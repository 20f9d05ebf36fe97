"""A scripted coding agent: the same conversation every time, from files of an installed package."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from retrieval_draft.errors import InvalidInputError

__all__ = ["LENGTHS", "Turn", "agent_turns"]

Turn = list[dict[str, Any]]
"""The messages of a request: the whole conversation up to the reply that is asked for."""

LENGTHS = {"short": 6, "medium": 14, "long": 40}
"""Lines of a file that a turn reads or writes, by the name of a length."""

_FILES = (
    "measure.py",
    "padding.py",
    "containers.py",
    "columns.py",
    "progress_bar.py",
    "status.py",
    "json.py",
)
_SYSTEM = """You are a coding agent in a repository. Answer each message with one JSON object alone.
Tools:
{"tool": "read_file", "arguments": {"path": string, "from": integer, "to": integer}}
{"tool": "edit_file", "arguments": {"path": string, "old": string, "new": string}}
{"tool": "run", "arguments": {"command": string}}"""


def agent_turns(length: str, turns: int = 20) -> list[Turn]:
    """The requests of an agent that reads, edits and tests one file after the other.

    The client sends the conversation again with every turn. Its own earlier replies are the script's, so that
    every server gets the same requests, for any answers.

    Args:
        length: One of `LENGTHS`.
        turns: Requests.
    """
    if length not in LENGTHS:
        raise InvalidInputError(f"There is no length {length!r}.", f"Choose from {', '.join(LENGTHS)}.")
    lines = LENGTHS[length]
    messages: Turn = [{"role": "system", "content": _SYSTEM}]
    asked: list[Turn] = []
    for number in range(turns):
        path = _FILES[number // 4 % len(_FILES)]
        source = _lines(path)
        begin = 8 + lines * (number // (4 * len(_FILES)))
        part = source[begin : begin + lines]
        user, reply = _step(number % 4, path, begin, part)
        messages.append({"role": "user", "content": user})
        asked.append(list(messages))
        messages.append({"role": "assistant", "content": reply})
    return asked


def _step(kind: int, path: str, begin: int, part: list[str]) -> tuple[str, str]:
    """A message of the user or of a tool, and the agent's reply: read, edit, run, read again."""
    part_read = {"path": f"src/{path}", "from": begin, "to": begin + len(part)}
    old = next((line for line in part if "def " in line or "=" in line), part[0])
    new = f"{old}  # checked"
    edit = {"path": f"src/{path}", "old": old, "new": new}
    name = path.removesuffix(".py")
    command = {"command": f"python -m pytest -q tests/test_{name}.py"}
    if kind == 0:
        return f"Mark the first definition in src/{path} as checked.", _call("read_file", part_read)
    if kind == 1:
        return "\n".join([f"src/{path}:", *part]), _call("edit_file", edit)
    if kind == 2:
        return json.dumps({"ok": True, "path": f"src/{path}", "replaced": 1}), _call("run", command)
    failed = "\n".join(
        [f"FAILED tests/test_{name}.py::test_source", *part[:4], "1 failed, 3 passed in 0.12s"]
    )
    return failed, _call("read_file", part_read)


def _call(tool: str, arguments: dict[str, Any]) -> str:
    return json.dumps({"tool": tool, "arguments": arguments})


def _lines(path: str) -> list[str]:
    spec = find_spec("rich")
    if spec is None or spec.origin is None:
        raise InvalidInputError("The package rich, whose files the agent reads, is not installed.")
    return (Path(spec.origin).parent / path).read_text("utf-8").splitlines()
