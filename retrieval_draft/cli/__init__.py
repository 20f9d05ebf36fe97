"""The command ``retrieval-draft``.

Data goes to stdout, logs and progress to stderr. Exit codes: 0 done, 1 failed, 2 usage, 3 verification
found a difference, 130 interrupted. torch loads only when a command needs it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from retrieval_draft import __version__
from retrieval_draft.cli import bench, demo, drafts, generate, index, serve, store
from retrieval_draft.errors import RetrievalDraftError

__all__ = ["app", "main"]

FAILED, USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="retrieval-draft",
    help="Generate the same text in fewer forward passes, by drafting from text seen before.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("generate")(generate.generate)
app.command("demo")(demo.demo)
app.command("serve")(serve.serve)
app.add_typer(index.app, name="index")
app.add_typer(store.app, name="store")
app.add_typer(drafts.app, name="drafts")
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and more of the log.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None, commands: typer.Typer = app) -> NoReturn:
    """Runs a command line and exits.

    Args:
        arguments: Words after the program's name; those of the process by default.
        commands: The available commands; ``python -m benchmarks`` has its own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    # It may be anywhere, as users add it to the end of a line that failed.
    words = [word for number, word in enumerate(words) if word != "--debug" or number > end]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks is replaced, and the rest is printed.
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("retrieval_draft").setLevel(logging.DEBUG if debug else logging.INFO)
    sys.exit(_run(commands, words, debug))


def _run(commands: typer.Typer, words: list[str], debug: bool) -> int:
    try:
        code = commands(words, standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has left; Python must not report that again when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if debug:
            raise
        return _report(error)
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    """Prints an error and its hint; returns the exit code."""
    # typer's usage errors come from click, or from its own copy of click in newer releases.
    usage = getattr(error, "format_message", None)
    if usage is not None:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "retrieval-draft"
        _print_error(usage(), f"See {command} --help.")
        return USAGE
    if isinstance(error, RetrievalDraftError):
        _print_error(error.message, error.hint)
        return FAILED
    _print_error(
        f"{type(error).__name__}: {error}", "This is unexpected. Run again with --debug for a traceback."
    )
    return FAILED


def _print_error(message: str, hint: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint:  {hint}", file=sys.stderr)
