from __future__ import annotations

import pytest

from tests.support.engine_events import ended, report, row, started

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from retrieval_draft.server.observability.tracing import Tracing

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def traced() -> tuple[Tracing, InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider.get_tracer("test"), "m"), exporter


def spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_is_a_span_with_its_phases() -> None:
    tracing, exporter = traced()
    tracing.request_started(started())
    tracing.step(report(row()))
    tracing.step(report(row(), row("other")))
    tracing.request_ended(ended())
    found = spans(exporter)
    assert set(found) == {"text_completion m", "queued", "prefill", "decode"}
    whole = found["text_completion m"]
    assert whole.attributes is not None
    assert whole.attributes["gen_ai.request.model"] == "m"
    assert whole.attributes["gen_ai.usage.input_tokens"] == 12
    assert whole.attributes["gen_ai.usage.output_tokens"] == 4
    assert whole.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert whole.attributes["retrieval_draft.tokens_per_step"] == 3.0
    decode = found["decode"].attributes
    assert decode is not None
    assert (decode["retrieval_draft.steps"], decode["retrieval_draft.accepted_tokens"]) == (2, 2)
    assert decode["retrieval_draft.accepted.history"] == 2
    assert whole.parent is None
    for name in ("queued", "prefill", "decode"):
        parent = found[name].parent
        assert parent is not None
        assert parent.span_id == whole.context.span_id
    assert found["queued"].start_time == whole.start_time
    seconds = [(span.end_time or 0) - (span.start_time or 0) for span in (found["queued"], found["prefill"])]
    assert seconds == [500_000_000, 250_000_000]


def test_the_callers_span_is_the_parent() -> None:
    tracing, exporter = traced()
    tracing.request_started(started(traceparent=PARENT))
    tracing.request_ended(ended())
    parent = spans(exporter)["text_completion m"].parent
    assert parent is not None
    assert f"{parent.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{parent.span_id:016x}" == PARENT.split("-")[2]
    tracing.request_started(started("q", traceparent="no such thing"))
    tracing.request_ended(ended("q"))
    assert exporter.get_finished_spans()[-1].parent is None


def test_failures_are_marked_and_strangers_ignored() -> None:
    tracing, exporter = traced()
    tracing.request_ended(ended("nobody"))
    tracing.step(report(row("nobody")))
    tracing.queue_changed(1, 1)
    assert exporter.get_finished_spans() == ()
    tracing.request_started(started())
    tracing.request_ended(ended(reason="error"))
    assert spans(exporter)["text_completion m"].status.status_code is StatusCode.ERROR
    tracing.close()


def test_the_exporter_is_optional() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    tracing = Tracing.to_otlp("http://127.0.0.1:9", model_name="m")
    tracing._provider.shutdown()  # nothing was traced, so nothing is sent
