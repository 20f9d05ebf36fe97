"""Structured output over HTTP: answers under grammars, in company, and failures that stay alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from retrieval_draft.drafting.grammar import grammar_text
from tests.support.grammars import CHOICES, PATTERN, SCHEMAS, follows, json_model, json_tokenizer
from tests.support.servers import MODEL, TEMPLATE, Running, serving, tiny_drafter


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    tokenizer = json_tokenizer()
    tokenizer.chat_template = TEMPLATE
    with serving(tiny_drafter(json_model(), tokenizer), tokenizer) as server:
        yield server


ASKED: dict[str, dict[str, Any]] = {
    **{
        name: {"response_format": {"type": "json_schema", "json_schema": {"schema": schema, "strict": True}}}
        for name, schema in SCHEMAS.items()
    },
    "regex": {"structured_outputs": {"regex": PATTERN}},
    "choice": {"guided_choice": CHOICES},
}


def post(running: Running, path: str, **body: Any) -> httpx.Response:
    given = (
        {"prompt": "user"} if path == "completions" else {"messages": [{"role": "user", "content": "age"}]}
    )
    json_body = {"model": MODEL, "max_tokens": 120, **given, **body}
    return httpx.post(f"{running.url}/v1/{path}", json=json_body, timeout=60)


def test_all_shapes_at_once_in_both_endpoints(running: Running) -> None:
    def ask(job: tuple[str, str, int]) -> None:
        shape, path, seed = job
        body = {"temperature": 0} if seed < 0 else {"temperature": 0.9, "seed": seed}
        answers = [post(running, path, **body, **ASKED[shape]).json()["choices"][0] for _ in range(2)]
        (text, again) = [
            each["text"] if path == "completions" else each["message"]["content"] for each in answers
        ]
        assert text == again, "alone, in company, and drafted from what was answered before"
        assert answers[0]["finish_reason"] == "stop"
        assert follows(shape, text), (shape, text)

    jobs = [
        (shape, path, seed)
        for shape in ASKED
        for path in ("completions", "chat/completions")
        for seed in (-1, 5)
    ]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, jobs))


def test_a_stream_is_the_same_text(running: Running) -> None:
    whole = post(running, "completions", temperature=0, **ASKED["nested"]).json()["choices"][0]["text"]
    lines = post(running, "completions", temperature=0, stream=True, **ASKED["nested"]).text.splitlines()
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(part["choices"][0]["text"] for part in parts if part["choices"]) == whole


def test_a_grammar_that_fails_midway_fails_alone(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    original = grammar_text.GrammarText.mask

    def mask(self: Any) -> Any:
        if len(self._reply) > 3 and self._matcher.compute_ff_bytes() == b"":
            monkeypatch.setattr(grammar_text.GrammarText, "mask", original)
            raise RuntimeError("broken")
        return original(self)

    monkeypatch.setattr(grammar_text.GrammarText, "mask", mask)
    broken = post(running, "completions", temperature=0, **ASKED["arrays"])
    assert broken.status_code == 500
    assert "broken" not in broken.text
    assert post(running, "completions", temperature=0, **ASKED["arrays"]).status_code == 200
