"""Prometheus metrics of the serving engine, under vLLM's names with a prefix of our own."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from retrieval_draft.server.observability.metrics_state import StateCollector
from retrieval_draft.server.scheduler.events import RequestEnd, RequestStart, StepReport

__all__ = ["PREFIX", "SECONDS", "STEP_SECONDS", "ServerMetrics"]

PREFIX = "retrieval_draft:"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
STEP_SECONDS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_POSITIONS = 32
"""Deeper nodes are counted at the last position, so that there are not more series than this."""


class ServerMetrics:
    """An `EngineListener` that counts for Prometheus.

    On the engine's thread a step costs a few additions: rows are summed first, and children of labels are
    bound once. The state of stores and indexes is read at each scrape.

    Args:
        model_name: A label of every metric of the engine.

    Attributes:
        registry: Of the metrics.

    Example:
        metrics = ServerMetrics(model_name="gemma3-270m")
        metrics.watch("default", drafter)
        body, content_type = metrics.render()
    """

    def __init__(self, model_name: str = "") -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._state = StateCollector()
        self.registry.register(self._state)
        self._drafts = self._counter("spec_decode_num_drafts", "Steps of a row that verified drafts.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Draft nodes verified.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Draft nodes accepted, bonus not.")
        per_position = self._vector(
            Counter, "spec_decode_num_accepted_tokens_per_pos", "Accepted by depth, from 0.", "position"
        )
        self._positions = [self._child(per_position, str(position)) for position in range(_POSITIONS)]
        self._row_steps = self._counter("row_steps", "Steps of all rows, those without drafts included.")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._looked_up = self._counter("prefix_cache_queries", "Tokens of prompts that were looked up.")
        self._hits = self._counter("prefix_cache_hits", "Those of them whose keys were kept.")
        self._generated = self._counter("generation_tokens", "Tokens of replies.")
        self._ended = self._vector(Counter, "request_success", "Choices that ended.", "finished_reason")
        self._by_name = {
            (kind, label): self._vector(Counter, f"{label}_{kind}_tokens", f"Nodes {kind} by {label}.", label)
            for label in ("source", "level")
            for kind in ("draft", "accepted")
        }
        self._failures = self._counter("source_failures", "Calls in which a draft source raised.")
        self._running = self._one(Gauge, "num_requests_running", "Rows in the batch.")
        self._waiting = self._one(Gauge, "num_requests_waiting", "Requests that wait for a row of the batch.")
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival.", SECONDS)
        self._latency = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", SECONDS)
        self._queued = self._histogram(
            "request_queue_time_seconds", "Waiting for a row of the batch.", SECONDS
        )
        self._prefill = self._histogram("request_prefill_time_seconds", "The prompt's pass.", SECONDS)
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._replies = self._histogram("request_generation_tokens", "Tokens of a reply.", _TOKENS)
        self._between = self._histogram("inter_token_latency_seconds", "Step over its tokens.", STEP_SECONDS)
        self._steps = self._histogram("step_seconds", "A whole step.", STEP_SECONDS)
        self._draft = self._histogram("draft_seconds", "Proposals, fusion, budget.", STEP_SECONDS)
        self._verify = self._histogram("verify_seconds", "The forward pass.", STEP_SECONDS)
        self._commit = self._histogram("commit_seconds", "Packing and moving the path.", STEP_SECONDS)
        self._learn = self._histogram("learn_seconds", "What sources take note of.", STEP_SECONDS)
        self._nodes = self._histogram("node_budget", "Draft nodes of a row's step.", (0, *_SIZES))
        self._batch = self._histogram("batch_size", "Rows of a step.", _SIZES)
        self._plain = self._one(
            Gauge, "plain_step_seconds", "What a step without drafts is measured to take; 0 where unknown."
        )

    def watch(self, tenant: str, drafter: Any) -> None:
        """Reports the memory of a drafter or proposer, and the state of its store, from now on.

        Args:
            tenant: A label.
            drafter: It has a ``store`` that may be None, and perhaps ``nbytes``. It is held weakly.
        """
        self._state.watch(tenant, drafter)

    def render(self) -> tuple[bytes, str]:
        """The page for Prometheus, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def queue_changed(self, waiting: int, running: int) -> None:
        """Records the number of waiting requests, and of rows in the batch."""
        self._waiting.set(waiting)
        self._running.set(running)

    def request_started(self, start: RequestStart) -> None:
        """Counts a row that joined the batch."""
        if start.index == 0:
            self._prompt.inc(start.prompt_tokens)
            self._looked_up.inc(start.prompt_tokens)
            self._hits.inc(start.cached_tokens)
            self._prompts.observe(start.prompt_tokens)
            self._prefill.observe(start.prefill_seconds)
        self._queued.observe(start.queued_seconds)
        self._generated.inc()  # the prompt's pass yields the first token

    def step(self, report: StepReport) -> None:
        """Counts a verified forward pass."""
        drafts = drafted = accepted = emitted = 0
        for row in report.rows:
            nodes, taken = row.plan.tree.num_draft_tokens, len(row.path) - 1
            drafts += nodes > 0
            drafted += nodes
            accepted += taken
            emitted += len(row.tokens)
            self._nodes.observe(nodes)
            for position in range(taken):
                self._positions[min(position, _POSITIONS - 1)].inc()
        rows = len(report.rows)
        self._drafts.inc(drafts)
        self._drafted.inc(drafted)
        self._accepted.inc(accepted)
        self._generated.inc(emitted)
        self._row_steps.inc(rows)
        self._batch.observe(rows)
        if emitted:
            self._between.observe(report.seconds * rows / emitted)
        self._steps.observe(report.seconds)
        self._draft.observe(report.draft_seconds)
        self._verify.observe(report.forward_seconds)
        self._commit.observe(report.commit_seconds)
        self._learn.observe(report.learn_seconds)
        self._plain.set(report.plain_seconds)

    def request_ended(self, end: RequestEnd) -> None:
        """Counts a choice that is complete or aborted."""
        self._child(self._ended, end.reason).inc()
        self._latency.observe(end.seconds)
        if end.first_token_seconds > 0:
            self._first_token.observe(end.first_token_seconds)
        self._replies.observe(end.completion_tokens)
        stats = end.stats
        for (kind, label), counts in (
            (("draft", "source"), stats.drafted_by_source),
            (("draft", "level"), stats.drafted_by_level),
            (("accepted", "source"), stats.accepted_by_source),
            (("accepted", "level"), stats.accepted_by_level),
        ):
            for name, count in counts.items():
                self._child(self._by_name[kind, label], name).inc(count)
        self._failures.inc(stats.source_failures)

    def _vector(self, kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
        return kind(PREFIX + name, text, ("model_name", *labels), registry=self.registry, **options)

    def _child(self, vector: Any, *values: str) -> Any:
        return vector.labels(self._model, *values)

    def _one(self, kind: Any, name: str, text: str, **options: Any) -> Any:
        return self._child(self._vector(kind, name, text, **options))

    def _counter(self, name: str, text: str) -> Any:
        return self._one(Counter, name, text)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        return self._one(Histogram, name, text, buckets=buckets)
