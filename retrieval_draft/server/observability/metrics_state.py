"""State of stores and indexes, read at each scrape."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from retrieval_draft.index.store.counts import REASONS
from retrieval_draft.index.store.health import STATES

__all__ = ["StateCollector"]

_log = logging.getLogger("retrieval_draft")

_COUNTERS = {
    "sent": ("store_entries_sent", "Entries with texts that the store accepted."),
    "received": ("store_entries_received", "Entries read, our own among them."),
    "ingested": ("store_entries_ingested", "Entries with texts taken in."),
    "sent_learned": ("store_learned_sent", "Entries with rows or a calibration that the store accepted."),
    "learned_entries": ("store_learned_ingested", "Entries with rows or a calibration taken in."),
    "duplicates": ("store_entries_duplicate", "Entries that had come before."),
    "unsent_dropped": ("store_entries_unsent", "Runs dropped before they were sent."),
    "failures": ("store_errors", "Calls to the store that failed."),
}
_GAUGES = {
    "waiting": ("store_entries_waiting", "Runs that wait to be sent."),
    "tokens": ("store_tokens", "Shared tokens that can be drafted from."),
    "nbytes": ("store_bytes", "Bytes of shared text here."),
    "servers": ("store_servers", "Servers whose entries came in."),
}


class StateCollector(Collector):
    """Reads the watched objects at each scrape, without those that are gone or fail; failures are logged."""

    def __init__(self) -> None:
        self._watched: dict[str, weakref.ref[Any]] = {}
        self._lock = threading.Lock()

    def watch(self, tenant: str, drafter: Any) -> None:
        """Reports on a drafter or proposer under a tenant's name; a new one replaces the old."""
        with self._lock:
            self._watched[tenant] = weakref.ref(drafter)

    def collect(self) -> Iterator[Metric]:
        """One family for each name, with all tenants."""
        with self._lock:
            found = [(tenant, reference()) for tenant, reference in self._watched.items()]
        statuses = {}
        held = GaugeMetricFamily(
            "retrieval_draft:index_bytes", "Bytes that a source drafts from.", labels=("tenant", "source")
        )
        for tenant, drafter in found:
            if drafter is None:
                continue
            try:
                for name, nbytes in _nbytes(drafter).items():
                    held.add_metric((tenant, name), nbytes)
                if drafter.store is not None:
                    statuses[tenant] = drafter.store.status()
            except Exception:
                _log.warning(
                    "The state of tenant %s could not be read for the metrics.", tenant, exc_info=True
                )
        yield held
        yield _prefix_family([drafter for _, drafter in found])
        yield from _store_families(statuses)


def _prefix_family(drafters: list[Any]) -> Metric:
    """Bytes of keys and values, which the drafters of one model share."""
    caches = {
        id(cache): cache for each in drafters if (cache := getattr(each, "prefix_cache", None)) is not None
    }
    return GaugeMetricFamily(
        "retrieval_draft:prefix_cache_bytes",
        "Bytes of keys and values of earlier texts.",
        value=sum(cache.nbytes for cache in caches.values()),
    )


def _store_families(statuses: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "retrieval_draft:store_state", "1 for the state that the store is in.", labels=("tenant", "state")
    )
    dropped = CounterMetricFamily(
        "retrieval_draft:store_entries_dropped", "Entries not taken in.", labels=("tenant", "reason")
    )
    for tenant, status in statuses.items():
        for each in STATES:
            state.add_metric((tenant, each), float(status["state"] == each))
        for reason in REASONS:
            dropped.add_metric((tenant, reason), status["dropped"][reason])
    yield state
    yield dropped
    families: tuple[tuple[Any, dict[str, tuple[str, str]]], ...] = (
        (CounterMetricFamily, _COUNTERS),
        (GaugeMetricFamily, _GAUGES),
    )
    for kind, names in families:
        for key, (name, text) in names.items():
            family = kind(f"retrieval_draft:{name}", text, labels=("tenant",))
            for tenant, status in statuses.items():
                family.add_metric((tenant,), status[key])
            yield family


def _nbytes(drafter: Any) -> dict[str, int]:
    """Bytes by source, or in one sum where sources are not known."""
    by_source = getattr(drafter, "nbytes_by_source", None)
    if by_source is not None:
        return dict(by_source)
    total = getattr(drafter, "nbytes", None)
    return {} if total is None else {"all": total}
