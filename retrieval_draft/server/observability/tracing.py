"""OpenTelemetry spans of requests: waiting, the prompt's pass, decoding."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from retrieval_draft import __version__
from retrieval_draft.errors import RetrievalDraftError
from retrieval_draft.server.scheduler.events import RequestEnd, RequestStart, StepReport

__all__ = ["Tracing"]

_MAX_OPEN = 65536
_NANOSECONDS = 1_000_000_000


@dataclass(slots=True)
class _Open:
    span: Span
    tracked: Span
    steps: int = 0


class Tracing:
    """An `EngineListener` that makes a span for each choice, with children for its phases.

    Attributes follow the semantic conventions for generative AI (``gen_ai.*``); drafting counts have names of
    their own (``retrieval_draft.*``). Spans end on the engine's thread and are exported on another.

    Args:
        tracer: Makes the spans.
        model_name: Name of the model for clients.

    Example:
        tracing = Tracing.to_otlp("http://localhost:4318", model_name="gemma3-270m")
    """

    def __init__(self, tracer: Tracer, model_name: str = "") -> None:
        self._tracer, self._model = tracer, model_name
        self._open: dict[tuple[str, int], _Open] = {}
        self._provider: Any = None

    @classmethod
    def to_otlp(cls, endpoint: str, *, model_name: str = "") -> Tracing:
        """Exports spans to a collector, by OTLP over HTTP.

        Args:
            endpoint: ``http://HOST:4318``.
            model_name: Name of the model for clients.

        Raises:
            RetrievalDraftError: The exporter is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise RetrievalDraftError(
                f"Tracing needs {error.name}, which is not installed.",
                'Run: pip install "retrieval_draft[tracing]"',
            ) from error
        url = endpoint.rstrip("/") + "/v1/traces"
        name = os.environ.get("OTEL_SERVICE_NAME", "retrieval-draft")
        provider = TracerProvider(
            resource=Resource.create({"service.name": name, "service.version": __version__})
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        tracing = cls(provider.get_tracer("retrieval_draft", __version__), model_name)
        tracing._provider = provider
        return tracing

    def queue_changed(self, waiting: int, running: int) -> None:
        """Does nothing: not traced."""

    def request_started(self, start: RequestStart) -> None:
        """Starts the span of a row that joined the batch, with its earlier phases."""
        now = time.time_ns()
        prefilled = now - int(start.prefill_seconds * _NANOSECONDS)
        arrived = prefilled - int(start.queued_seconds * _NANOSECONDS)
        parent = _parent(start)
        span = self._tracer.start_span(
            f"text_completion {self._model}".strip(),
            context=parent,
            kind=SpanKind.SERVER,
            start_time=arrived,
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.provider.name": "retrieval_draft",
                "gen_ai.request.model": self._model,
                "gen_ai.response.id": start.request_id,
                "gen_ai.usage.input_tokens": start.prompt_tokens,
                "retrieval_draft.choice": start.index,
                "retrieval_draft.tenant": start.tenant,
            },
        )
        inside = trace.set_span_in_context(span)
        self._tracer.start_span("queued", inside, start_time=arrived).end(prefilled)
        self._tracer.start_span("prefill", inside, start_time=prefilled).end(now)
        decoding = self._tracer.start_span("decode", inside, start_time=now)
        if len(self._open) >= _MAX_OPEN:  # ends that were never reported must not accumulate
            self._open.pop(next(iter(self._open)))
        self._open[start.request_id, start.index] = _Open(span, decoding)

    def step(self, report: StepReport) -> None:
        """Counts a step. Steps are not traced: there are hundreds in a second."""
        for row in report.rows:
            found = self._open.get((row.request_id, row.index))
            if found is not None:
                found.steps += 1

    def request_ended(self, end: RequestEnd) -> None:
        """Ends the span of a choice that is complete or aborted."""
        found = self._open.pop((end.request_id, end.index), None)
        if found is None:
            return
        stats = end.stats
        drafting = {
            "retrieval_draft.steps": found.steps,
            "retrieval_draft.tokens_per_step": round(stats.tokens_per_step, 4),
            "retrieval_draft.draft_tokens": stats.drafted,
            "retrieval_draft.accepted_tokens": stats.accepted,
            "retrieval_draft.acceptance_rate": round(stats.acceptance_rate, 4),
            "retrieval_draft.draft_seconds": stats.draft_seconds,
            "retrieval_draft.verify_seconds": stats.forward_seconds,
        }
        for level, count in stats.accepted_by_level.items():
            drafting[f"retrieval_draft.accepted.{level}"] = count
        found.tracked.set_attributes(drafting)
        found.tracked.end()
        found.span.set_attributes(
            {
                "gen_ai.usage.output_tokens": end.completion_tokens,
                "gen_ai.response.model": self._model,
                "gen_ai.response.finish_reasons": [end.reason],
                "gen_ai.response.time_to_first_chunk": end.first_token_seconds,
                "retrieval_draft.tokens_per_step": round(stats.tokens_per_step, 4),
            }
        )
        if end.reason == "error":
            found.span.set_status(Status(StatusCode.ERROR))
            found.span.set_attribute("error.type", "error")
        found.span.end()

    def close(self) -> None:
        """Exports waiting spans."""
        if self._provider is not None:
            self._provider.shutdown()


def _parent(start: RequestStart) -> Any:
    """The parent span by W3C's ``traceparent``; None without one."""
    if not start.traceparent:
        return None
    return TraceContextTextMapPropagator().extract({"traceparent": start.traceparent})
