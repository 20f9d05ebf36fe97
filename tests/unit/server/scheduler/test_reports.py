"""Reports to listeners; one that raises is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from retrieval_draft.server.scheduler import reports as reports_module
from retrieval_draft.server.scheduler.reports import Reports
from tests.support.engine_events import plan
from tests.support.jobs import empty_job


class Listener:
    def __init__(self, raises: bool = False) -> None:
        self.raises = raises
        self.told: list[Any] = []

    def _note(self, told: Any) -> None:
        self.told.append(told)
        if self.raises:
            raise RuntimeError("broken on purpose")

    def queue_changed(self, waiting: int, running: int) -> None:
        self._note((waiting, running))

    request_started = step = request_ended = _note


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports_module, "monotonic", lambda: 110.0)


def test_the_queue_is_told_of_when_it_changes() -> None:
    listener = Listener()
    reports = Reports([listener])
    for waiting, running in ((0, 0), (0, 0), (1, 0), (0, 1), (0, 1)):
        reports.queue(waiting, running)
    assert listener.told == [(0, 0), (1, 0), (0, 1)]


def test_one_that_raises_is_left_out_and_the_others_hear_all(caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = Listener(raises=True), Listener()
    reports = Reports([broken, sound])
    reports.queue(1, 0)
    reports.queue(2, 0)
    assert (broken.told, sound.told) == ([(1, 0)], [(1, 0), (2, 0)])
    assert caplog.text.count("A listener raised and is left out") == 1


def test_a_start_has_the_time_it_waited_and_a_job_s_names() -> None:
    listener, job = Listener(), empty_job("a", 1, 1, tenant="x")
    job.arrived, job.traceparent = 100.0, "00-trace"
    choice = job.choices[1]
    choice.request.prompt = np.array([1, 2, 3], np.int32)
    choice.stats.prefill_seconds = 0.5
    Reports([listener]).started(choice, joined=104.0)
    (start,) = listener.told
    assert (start.request_id, start.index, start.tenant, start.traceparent) == ("a", 1, "x", "00-trace")
    assert (start.prompt_tokens, start.queued_seconds, start.prefill_seconds) == (3, 4.0, 0.5)


@pytest.mark.parametrize(("first", "seconds"), [(103.0, 3.0), (0.0, 0.0)], ids=["some tokens", "none"])
def test_an_end_has_the_times_since_arrival(first: float, seconds: float) -> None:
    listener, job = Listener(), empty_job("a", 1)
    job.arrived, job.client_id = 100.0, "mine"
    (choice,) = job.choices
    choice.first, choice.stats.tokens = first, 7
    Reports([listener]).ended(choice, "abort")
    (end,) = listener.told
    assert (end.request_id, end.reason, end.client_id, end.completion_tokens) == ("a", "abort", "mine", 7)
    assert (end.first_token_seconds, end.seconds) == (seconds, 10.0)
    assert end.stats is choice.stats


class Row:
    def __init__(self, path: list[int]) -> None:
        self.path = path


class Step:
    """Of two rows, one of which has failed in the middle of it."""

    draft_seconds, forward_seconds, commit_seconds, learn_seconds, seconds = 1.0, 2.0, 3.0, 4.0, 11.0

    def __init__(self) -> None:
        self.rows, self.plans, self.emitted = [Row([0, 1]), Row([0])], [plan(), plan()], [[9, 7], [3]]


def test_a_step_is_told_of_row_by_row_without_those_that_have_failed() -> None:
    listener, job = Listener(), empty_job("a", 2)
    step: Any = Step()
    Reports([listener]).step(step, {step.rows[0]: job.choices[1]}, 0.25)
    (report,) = listener.told
    (row,) = report.rows
    assert (row.request_id, row.index, row.path, row.tokens) == ("a", 1, [0, 1], [9, 7])
    assert row.plan is step.plans[0]
    assert (report.draft_seconds, report.forward_seconds, report.commit_seconds) == (1.0, 2.0, 3.0)
    assert (report.learn_seconds, report.seconds, report.plain_seconds) == (4.0, 11.0, 0.25)
