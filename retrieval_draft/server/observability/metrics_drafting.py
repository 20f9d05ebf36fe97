"""Prometheus metrics of the drafting service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from retrieval_draft.server.observability.metrics import PREFIX, STEP_SECONDS

if TYPE_CHECKING:
    from retrieval_draft.draft_service.service import DraftService

__all__ = ["DraftingMetrics"]


class DraftingMetrics(Collector):
    """A `DraftObserver` that counts for Prometheus.

    Args:
        registry: Registry of the metrics, such as that of `ServerMetrics`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._service: DraftService | None = None
        self._registry = registry
        self._opened = self._counter("drafting_sessions_opened", "Sessions opened.")
        self._closed = Counter(
            f"{PREFIX}drafting_sessions_closed", "Sessions that ended.", ("reason",), registry=registry
        )
        self._steps = self._counter("drafting_steps", "Steps answered.")
        self._emitted = self._counter("drafting_emitted_tokens", "Tokens that engines emitted.")
        self._accepted = self._counter("drafting_accepted_tokens", "Emitted tokens that had been drafted.")
        self._nodes = self._counter("drafting_nodes", "Draft nodes handed out.")
        self._errors = Counter(
            f"{PREFIX}drafting_errors", "Requests and steps that failed.", ("status",), registry=registry
        )
        self._seconds = self._histogram("drafting_step_seconds", "One step, without the network.")
        self._open_seconds = self._histogram("drafting_open_seconds", "Opening a session.")
        registry.register(self)

    def watch(self, service: DraftService) -> None:
        """Reports the number of open sessions and tokens, from now on."""
        self._service = service

    def session_opened(self, seconds: float) -> None:
        """Counts an opened session."""
        self._opened.inc()
        self._open_seconds.observe(seconds)

    def session_closed(self, reason: str) -> None:
        """Counts a session that ended."""
        self._closed.labels(reason).inc()

    def stepped(self, emitted: int, accepted: int, nodes: int, seconds: float) -> None:
        """Counts an answered step."""
        self._steps.inc()
        self._emitted.inc(emitted)
        self._accepted.inc(accepted)
        self._nodes.inc(nodes)
        self._seconds.observe(seconds)

    def failed(self, status: int) -> None:
        """Counts a failed request or step."""
        self._errors.labels(str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """Numbers of open sessions and tokens."""
        table = None if self._service is None else self._service.table
        sessions = GaugeMetricFamily(f"{PREFIX}drafting_sessions", "Open sessions.")
        sessions.add_metric((), 0 if table is None else len(table))
        tokens = GaugeMetricFamily(f"{PREFIX}drafting_session_tokens", "Tokens of open sessions.")
        tokens.add_metric((), 0 if table is None else table.tokens)
        yield sessions
        yield tokens

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=STEP_SECONDS, registry=self._registry)
