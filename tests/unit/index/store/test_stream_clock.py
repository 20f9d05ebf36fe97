"""Time of a stream whose clock, or ours, is wrong."""

import random

import pytest

from retrieval_draft.index.store.rate_limit import BURST, RateLimit
from retrieval_draft.index.store.stream_clock import SLACK, StreamClock


def passed(ids: list[float], own: list[float]) -> list[float]:
    clock = StreamClock()
    return [clock.at(each, now) for each, now in zip(ids, own, strict=True)]


def test_docstring_example() -> None:
    assert passed([100, 101, 86501, 86501, 86501], [0, 0, 0, 10, 11]) == [0, 1, 86401, 86409, 86410]


def test_ids_tell_the_time_whatever_ours_says() -> None:
    ids = [float(second) for second in range(0, 1000, 10)]
    assert passed(ids, [0.0] * 100) == ids  # a log that is read at once
    assert passed(ids, [second + random.Random(0).uniform(0, SLACK) for second in ids]) == ids
    assert passed(ids, [5e6 - second for second in ids]) == ids  # no clock goes backwards, but if it did


@pytest.mark.parametrize("at", [1e6, 1e6 + 86_400, 1e9, (2**64 - 1) / 1000])
def test_time_goes_on_where_ids_stand_still(at: float) -> None:
    clock = StreamClock()
    clock.at(1e6, 0.0)
    start = clock.at(at, 0.0)
    assert clock.at(at, 60.0) - start == pytest.approx(60 - SLACK)
    assert clock.at(at, 61.0) - start == pytest.approx(61 - SLACK)


def test_another_stream_starts_over_and_time_does_not_go_back() -> None:
    clock = StreamClock()
    assert clock.at(1000.0, 0.0) == 0.0
    assert clock.at(1100.0, 0.0) == 100.0
    clock.restart()
    assert clock.at(10.0, 1.0) == 100.0
    assert clock.at(15.0, 2.0) == 105.0
    assert clock.at(12.0, 3.0) == 105.0  # read again


@pytest.mark.parametrize("jump", [0.0, 3600.0, 86_400.0, 3e9, 1.8e16])
@pytest.mark.parametrize("step", [0.0, 0.001, 1.0])
def test_who_keeps_to_the_rate_is_never_cut_off(jump: float, step: float) -> None:
    """Ids jump ahead, and then stand still, crawl or go on."""
    clock, limit = StreamClock(), RateLimit(1000)
    ids = 1e6
    for second in range(120):
        ids += jump if second == 30 else step if second > 30 else 1.0
        assert limit.allows(1000, clock.at(ids, float(second))), second


@pytest.mark.parametrize("step", [0.0, 1.0])
def test_who_does_not_is_cut_off(step: float) -> None:
    clock, limit = StreamClock(), RateLimit(1000)
    taken = sum(limit.allows(1000, clock.at(1e6 + step * each / 10, each / 10)) for each in range(1200))
    assert 120 - SLACK <= taken <= 120 + BURST + 1
