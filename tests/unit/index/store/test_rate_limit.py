"""Tests of the token bucket."""

import pytest

from retrieval_draft.index.store.rate_limit import BURST, RateLimit


def test_a_burst_passes_and_then_the_rate() -> None:
    limit = RateLimit(100)
    assert limit.allows(int(100 * BURST), 10.0)
    assert not limit.allows(1, 10.0)
    assert limit.allows(100, 11.0)
    assert not limit.allows(1, 11.0)
    assert not limit.allows(1, 5.0)  # a clock that goes back gives nothing
    assert limit.allows(1, 11.02)


def test_room_does_not_grow_beyond_a_burst() -> None:
    limit = RateLimit(100)
    limit.allows(0, 0.0)
    assert not limit.allows(int(100 * BURST) + 1, 1e9)
    assert limit.allows(int(100 * BURST), 1e9)


def test_a_sender_waits_for_room() -> None:
    limit = RateLimit(100)
    assert limit.wait(400, 0.0) == 0
    assert limit.wait(50, 0.0) == pytest.approx(0.5)
    assert limit.wait(50, 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("lump", [0.05, 0.5])
def test_what_a_sender_may_send_a_reader_accepts(lump) -> None:
    sender, reader = RateLimit(80), RateLimit(100)
    now = 0.0
    for _ in range(400):
        now += sender.wait(20, now)
        arrived = (now // lump + 1) * lump  # late, in lumps
        assert reader.allows(20, arrived)
