"""Tests of how a build's progress is shown."""

import io
import logging
import sys

from retrieval_draft.cli import _build_progress
from retrieval_draft.cli._build_progress import build_progress
from retrieval_draft.index.build.builder import BuildState


def test_lines_of_the_log_where_there_is_no_terminal(caplog, monkeypatch) -> None:
    monkeypatch.setattr(_build_progress, "_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "retrieval_draft"), build_progress(3, 2_000_000) as watch:
        watch(BuildState(tokens=10))
        watch(BuildState(tokens=5_000_000, file=2, done_bytes=1_000_000))
    assert "5.0M tokens" in caplog.text
    assert "file 2 of 3, 50% of 2 MB" in caplog.text


def test_a_bar_on_a_terminal(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with build_progress(1, 2_000_000) as watch:
        watch(BuildState())
        watch(BuildState(tokens=7_000_000, done_bytes=1_500_000))
    assert "7.0M tokens" in terminal.getvalue()
    assert "left" in terminal.getvalue()
