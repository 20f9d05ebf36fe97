"""Options of several commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from retrieval_draft.errors import InvalidInputError
from retrieval_draft.models.packaged import NAMES

__all__ = [
    "DIFFERENT",
    "Chat",
    "CpuKernels",
    "Device",
    "Dtype",
    "Exact",
    "Index",
    "Json",
    "Model",
    "Nodes",
    "Weights",
    "text_of",
    "text_of_stdin",
]

DIFFERENT = 3
"""Exit code: verification found a difference."""


def text_of(argument: str) -> str:
    """A text from the command line.

    Raises:
        InvalidInputError: Its bytes are no text.
    """
    # Bytes that the terminal's encoding lacks arrive as halves of surrogate pairs.
    try:
        return os.fsencode(argument).decode() if not _is_text(argument) else argument
    except UnicodeError as error:
        raise InvalidInputError(
            f"The text {argument[:40]!a} has bytes that are neither {sys.getfilesystemencoding()} nor UTF-8.",
            "Write it in UTF-8, or set the locale (LC_ALL) to the terminal's encoding.",
        ) from error


def text_of_stdin() -> str:
    """All of stdin, in its declared encoding, else in UTF-8.

    Raises:
        InvalidInputError: It is in neither.
    """
    stdin = sys.stdin
    if stdin is None:
        return ""
    buffer = getattr(stdin, "buffer", None)
    if buffer is None:  # text already
        return stdin.read()
    content = buffer.read()
    for encoding in (stdin.encoding, "utf-8"):
        try:
            return str(content.decode(encoding))
        except (UnicodeDecodeError, LookupError):
            pass
    raise InvalidInputError(
        f"What stands on stdin is neither {stdin.encoding} nor UTF-8.",
        "Write it in UTF-8, or name its encoding in PYTHONIOENCODING.",
    )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


Model = Annotated[str, typer.Option("--model", help=f"A folder, a hub name, {NAMES}.", show_default=False)]
Chat = Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="int8 or int4: round the weights, by optimum-quanto.", show_default=False),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, ... or auto. CUDA where there is one, by default.")
]
Nodes = Annotated[
    int | None,
    typer.Option("--nodes", min=0, help="Draft nodes of every step. By default the measured cost decides."),
]
CpuKernels = Annotated[
    bool,
    typer.Option(
        "--cpu-kernels/--stock-kernels", help="Faster layers for few tokens on the CPU while drafting."
    ),
]
Exact = Annotated[
    str | None,
    typer.Option(
        help='"bitwise": the same text in half precision with and without drafts, by passes of one shape.',
        show_default=False,
    ),
]
Index = Annotated[
    list[Path] | None,
    typer.Option("--index", help="A corpus index to draft from; repeatable.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
