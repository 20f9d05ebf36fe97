"""Checks command lines against the commands there are, without running them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer

from benchmarks.commands import app as benchmarks
from benchmarks.gpu_check import main as gpu_check
from retrieval_draft.cli import app as commands
from tests.support.pages import ROOT

COMMANDS, BENCHMARKS = typer.main.get_command(commands), typer.main.get_command(benchmarks)
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE))
PLACEHOLDER = re.compile(r"[A-Z_]+|\.\.\.")


def command_lines(text: str) -> list[list[str]]:
    """The commands of a shell block as words, without comments, variables before them and what joins them."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((at for at, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.match(r"[A-Z_]+=", command[0]):
                command.pop(0)
            if command:
                found.append(command)
    return found


def fault(words: list[str], *, whole: bool = True) -> str:
    """The fault of a command line; empty without one. Arguments are those of `check`."""
    try:
        check(words, whole=whole)
    except (Exception, SystemExit) as error:
        # click keeps its message in a method of its own; argparse has printed its own.
        return str(getattr(error, "format_message", error.__str__)()) or type(error).__name__
    return ""


def check(words: list[str], *, whole: bool = True) -> None:
    """Fails unless the program, its subcommand and each of its options exist.

    Args:
        words: A command line.
        whole: Required arguments are given; False for the name of a command in running text.
    """
    program, *rest = words
    if program == "retrieval-draft":
        _parse(COMMANDS, rest, whole)
    elif Path(program).name == "python" and rest[:2] == ["-m", "benchmarks"]:
        if rest[2] == "gpu_check":
            gpu_check._parse([*rest[3:], "--out", "folder"])
        else:
            _parse(BENCHMARKS, rest[2:], whole)
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), f"{rest[0]} does not exist"
    elif program == "pip":
        _check_install(rest)
    elif program == "cd":
        assert (ROOT / rest[0]).is_dir(), f"{rest[0]} does not exist"
    else:
        script = ROOT / program
        known = program.startswith(("./scripts/", ".ci/"))
        assert known, (
            f"nobody checks {program}: say why it is not run in <!-- not run: ... --> above the block"
        )
        assert script.is_file(), f"{program} does not exist"
        assert script.stat().st_mode & 0o100, f"{program} is not executable"


def _check_install(words: list[str]) -> None:
    assert words[0] == "install"
    for number, word in enumerate(words[1:], 1):
        if words[number - 1] in ("-c", "-r"):
            assert (ROOT / word).is_file(), f"{word} does not exist"
        assert not word.startswith("retrieval"), f"{word} is on no index: install from a clone, with a dot"
        local = re.fullmatch(r"\.\[([\w,]+)\]", word)
        if local:
            assert set(local[1].split(",")) <= EXTRAS, f"{word}: extras are {', '.join(sorted(EXTRAS))}"


def _parse(command: Any, words: list[str], whole: bool) -> None:
    words = [word for word in words if word != "..."]
    context = command.context_class(command, info_name=command.name)
    if hasattr(command, "commands"):
        _, rest, _ = command.make_parser(context).parse_args(words)
        if rest and not (PLACEHOLDER.fullmatch(rest[0]) and not whole):
            assert rest[0] in command.commands, f"{command.name} has no command {rest[0]}"
            _parse(command.commands[rest[0]], rest[1:], whole)
        else:
            assert not whole or words, f"{command.name} does nothing alone"
        return
    if not whole and words and _takes_value(command, words[-1]):
        words = [*words, "VALUE"]
    given, rest, _ = command.make_parser(context).parse_args(words)
    assert not rest, f"{command.name}: {' '.join(rest)} is too much"
    for parameter in command.params:
        value = given.get(parameter.name)
        if value is None or value == ():
            assert not (whole and parameter.required), f"{command.name} lacks {parameter.opts[0]}"
        elif not any(
            PLACEHOLDER.fullmatch(str(one)) for one in (value if isinstance(value, list) else [value])
        ):
            parameter.process_value(context, value)


def _takes_value(command: Any, word: str) -> bool:
    return any(
        word in each.opts and not getattr(each, "is_flag", False)
        for each in command.params
        if each.param_type_name == "option"
    )
