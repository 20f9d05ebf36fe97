"""Schemathesis against the OpenAPI schema: whatever it sends, the server answers, and never with a 500."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from retrieval_draft.server.full_app import create_full_app
from retrieval_draft.server.service import Service
from retrieval_draft.server.settings import ServerSettings
from tests.support.servers import MODEL, Running, serving, tiny_drafter, tiny_model, tiny_tokenizer

schemathesis: Any = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

EXAMPLES = 20
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


def _nothing() -> Any:
    raise AssertionError("only the schema is wanted")


SCHEMA = schemathesis.openapi.from_dict(create_full_app(Service(ServerSettings(MODEL), _nothing)).openapi())
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    tokenizer = tiny_tokenizer()
    drafter = tiny_drafter(tiny_model(tokenizer), tokenizer)
    with serving(drafter, tokenizer, max_tokens=8, max_batch=8, request_seconds=30) as made:
        yield made


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("label", OPERATIONS)
def test_no_request_makes_the_server_fail(running: Running, label: str, mode: Any) -> None:
    operation = OPERATIONS[label]
    if mode == GenerationMode.NEGATIVE and ("POST" not in label or label.endswith("embeddings")):
        pytest.skip("nothing can be wrong with it")

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = MODEL  # any other name ends at 404
        response = case.call(base_url=running.url, timeout=60)
        case.validate_response(response, checks=CHECKS)

    run()


def test_the_schema_has_all_routes() -> None:
    posts = (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
        "/v1/embeddings",
    )
    assert {"GET /v1/models", "GET /health", *(f"POST {path}" for path in posts)} <= set(OPERATIONS)


def test_nothing_is_left_behind(running: Running) -> None:
    assert running.wait_idle()
