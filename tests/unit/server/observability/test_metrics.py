from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from retrieval_draft.index.store.config import StoreConfig
from retrieval_draft.proposer import Proposer
from retrieval_draft.server.observability.metrics import ServerMetrics
from retrieval_draft.server.observability.metrics_drafting import DraftingMetrics
from tests.support.draft_services import draft_service
from tests.support.engine_events import empty_plan, ended, report, row, started
from tests.support.tokenizers_for_tests import byte_level


def values(metrics: ServerMetrics) -> dict[str, float]:
    """Every sample by its name and labels, the model's name left out."""
    page, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            name = sample.name.removeprefix("retrieval_draft:")
            assert name != sample.name, "every name has the prefix"
            found[name + ("" if not labels else str(sorted(labels.values())))] = sample.value
    return found


def test_a_request_is_counted_as_vllm_counts() -> None:
    metrics = ServerMetrics(model_name="m")
    metrics.queue_changed(3, 2)
    metrics.request_started(started())
    metrics.step(report(row(), row("q", (0,))))
    metrics.step(report(row("r", (0, 3))))
    metrics.request_ended(ended())
    found = values(metrics)
    assert found["spec_decode_num_drafts_total"] == 3
    assert found["spec_decode_num_draft_tokens_total"] == 9
    assert found["spec_decode_num_accepted_tokens_total"] == 3
    assert found["spec_decode_num_accepted_tokens_per_pos_total['0']"] == 2
    assert found["spec_decode_num_accepted_tokens_per_pos_total['1']"] == 1
    assert found["spec_decode_num_accepted_tokens_per_pos_total['2']"] == 0
    assert found["prompt_tokens_total"] == 12
    assert found["generation_tokens_total"] == 1 + 3 + 1 + 2
    assert found["request_success_total['stop']"] == 1
    assert (found["num_requests_waiting"], found["num_requests_running"]) == (3, 2)
    assert found["time_to_first_token_seconds_sum"] == 0.75
    assert found["e2e_request_latency_seconds_sum"] == 1.5
    assert found["request_queue_time_seconds_sum"] == 0.5
    assert found["verify_seconds_sum"] == 0.18
    assert found["inter_token_latency_seconds_sum"] == pytest.approx(0.2 / 4 + 0.1 / 2)
    assert found["batch_size_sum"] == 3
    assert found["node_budget_sum"] == 9
    assert found["source_accepted_tokens_total['history']"] == 2
    assert found["level_draft_tokens_total['request']"] == 2
    assert found["source_failures_total"] == 1
    assert found["plain_step_seconds"] == 0.08


def test_steps_without_drafts_are_no_drafts() -> None:
    metrics = ServerMetrics()
    plain = row()
    metrics.step(report(type(plain)("r", 0, empty_plan(), [0], [5])))
    found = values(metrics)
    assert (found["spec_decode_num_drafts_total"], found["row_steps_total"]) == (0, 1)
    assert found["generation_tokens_total"] == 1


def test_the_store_and_the_indexes_are_read_when_asked(tmp_path: Path) -> None:
    metrics = ServerMetrics()
    config = StoreConfig(f"embedded://{tmp_path / 'store'}", tenant="a")
    with Proposer.for_tokenizer(byte_level(()), store=config) as proposer:
        assert proposer.store is not None
        proposer.store.wait_ready()
        metrics.watch("a", proposer)
        found = values(metrics)
        assert found["store_state['a', 'connected']"] == 1
        assert found["store_state['a', 'unreachable']"] == 0
        assert found["store_entries_dropped_total['a', 'rate']"] == 0
        assert found["store_entries_sent_total['a']"] == 0
        assert found["index_bytes['a', 'adjacency']"] > 0
    del proposer
    assert "index_bytes['a', 'adjacency']" not in values(metrics), "it is not kept alive"


def test_a_store_that_cannot_be_read_spoils_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        store = None

        @property
        def nbytes(self) -> int:
            raise OSError("gone")

    metrics, broken = ServerMetrics(), Broken()
    metrics.watch("a", broken)
    assert values(metrics)["row_steps_total"] == 0
    assert "The state of tenant a could not be read" in caplog.text


def test_the_drafting_service_has_its_own() -> None:
    metrics = ServerMetrics()
    observer = DraftingMetrics(metrics.registry)
    assert values(metrics)["drafting_sessions"] == 0
    with draft_service() as service:
        observer.watch(service)
        observer.session_opened(0.25)
        observer.stepped(4, 3, 60, 0.5)
        observer.session_closed("expired")
        observer.failed(404)
        service.table.reserve(7)
        found = values(metrics)
        assert found["drafting_session_tokens"] == 7
        service.table.give_back(7)
    assert found["drafting_steps_total"] == 1
    assert found["drafting_emitted_tokens_total"] == 4
    assert found["drafting_accepted_tokens_total"] == 3
    assert found["drafting_nodes_total"] == 60
    assert found["drafting_step_seconds_sum"] == 0.5
    assert found["drafting_sessions_closed_total['expired']"] == 1
    assert found["drafting_errors_total['404']"] == 1


def calls(rows: int) -> int:
    """Functions called, ours and others', while a step of so many rows is counted."""
    metrics, count = ServerMetrics(), 0
    given = report(*[row(f"r{number}") for number in range(rows)])

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    metrics.step(given)  # what is made for the first step only
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        metrics.step(given)
    finally:
        sys.setprofile(before)
    return count


def test_a_step_costs_the_engine_little() -> None:
    """Calls, not seconds, so that other work on the machine does not count."""
    assert calls(8) < 600
    assert calls(16) - calls(8) < 8 * 50, "and each row adds a few"


def exported() -> set[str]:
    metrics = ServerMetrics()
    DraftingMetrics(metrics.registry)
    metrics.request_started(started())
    metrics.step(report(row()))
    metrics.request_ended(ended())
    return set(re.findall(r"^# TYPE (\S+)", metrics.render()[0].decode(), re.M))


def test_every_panel_of_the_grafana_dashboard_shows_what_is_exported() -> None:
    import json

    names = exported()
    board = json.loads(Path("deploy/grafana-dashboard.json").read_text("utf-8"))
    expressions: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("expr"), str):
                expressions.append(value["expr"])
            for inner in value.values():
                collect(inner)
        elif isinstance(value, list):
            for inner in value:
                collect(inner)

    collect(board)
    assert len(expressions) >= 12
    for expression in expressions:
        used = re.findall(r"retrieval_draft:\w+", expression)
        assert used, expression
        for name in used:
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            assert name in names or base in names, f"{name} is not exported"
