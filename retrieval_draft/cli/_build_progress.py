"""Progress of an index build: a bar on a terminal, regular lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from retrieval_draft.index.build.builder import BuildState

__all__ = ["build_progress"]

_LOG = logging.getLogger("retrieval_draft")
_SECONDS = 10.0


@contextmanager
def build_progress(files: int, nbytes: int) -> Iterator[Callable[[BuildState], None]]:
    """Yields a function that a build calls with its state.

    Args:
        files: Files to read.
        nbytes: Their bytes; 0 where that is not known.
    """
    begin = time.monotonic()
    first: list[int] = []

    def rate(state: BuildState) -> float:
        if not first:
            first.append(state.tokens)
        return (state.tokens - first[0]) / max(time.monotonic() - begin, 1e-9)

    if not sys.stderr.isatty():
        last = [begin]

        def line(state: BuildState) -> None:
            speed = rate(state)
            if time.monotonic() - last[0] >= _SECONDS:
                last[0] = time.monotonic()
                done = f", {100 * state.nbytes / nbytes:.0f}% of {nbytes / 1e6:.0f} MB" if nbytes else ""
                _LOG.info(
                    "Indexing: %.1fM tokens, %.2fM a second, file %d of %d%s",
                    state.tokens / 1e6, speed / 1e6, state.file, files, done,
                )  # fmt: skip

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("Indexing", total=nbytes or None, tokens="")

        def update(state: BuildState) -> None:
            speed = rate(state)
            text = f"{state.tokens / 1e6:.1f}M tokens, {speed / 1e6:.2f}M a second"
            bar.update(task, completed=state.nbytes, tokens=text)

        yield update
