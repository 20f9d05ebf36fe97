import io
import logging
import sys
import threading
import time

import pytest

from retrieval_draft._progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_fast_work_shows_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with caplog.at_level(logging.INFO), progress("Counting", 3, delay=5.0) as advance:
        advance(3)
    assert terminal.getvalue() == ""
    assert caplog.messages == []


def test_slow_work_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress("Counting", 3, delay=0.0) as advance:
        advance()
        time.sleep(0.5)
    assert "Counting" in terminal.getvalue()
    assert "1/3" in terminal.getvalue()


def test_without_a_terminal_one_line_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", plain := io.StringIO())
    with caplog.at_level(logging.INFO, "retrieval_draft"), progress("Counting", None, delay=0.0):
        time.sleep(0.2)
    assert caplog.messages == ["Counting ..."]
    assert plain.getvalue() == ""


def test_bars_of_several_threads_share_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            with progress(name, 50, delay=0.0) as advance:
                for _ in range(50):
                    advance()
                    time.sleep(0.005)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"work {number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(f"work {number}" in terminal.getvalue() for number in range(4))


def test_an_error_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    before = threading.active_count()

    def fail() -> None:
        with progress("Dividing", 1, delay=0.0):
            time.sleep(0.2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
