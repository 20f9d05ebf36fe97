from __future__ import annotations

from typing import Any

import pytest

from benchmarks.grammar_tasks import SUBJECTS, TASKS
from benchmarks.grammars import _requests, measure_grammars
from retrieval_draft.errors import InvalidInputError
from tests.support.grammars import json_model, json_tokenizer


def test_replies_are_compared_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    tokenizer = json_tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    monkeypatch.setattr("benchmarks.grammars.load_model", lambda name: (json_model(), tokenizer))
    result: Any = measure_grammars("tiny", 2, shapes=("regex", "deep", "call"), new=320)
    assert set(result["shapes"]) == {"regex", "deep", "call"}
    assert set(result["fewer_passes"]) == {"json", "call", "text"}
    assert result["equal"] == result["requests"] == 6
    assert result["valid"] == result["ended"] > 0
    assert result["shapes"]["call"]["fewer_passes"] > 1


def test_two_halves_are_each_request_both_ways() -> None:
    halves = [set(_requests(4, ways)) for ways in ("alternating", "reversed")]
    assert len(halves[0]) == len(halves[1]) == 4
    assert halves[0] | halves[1] == set(_requests(4, "both"))
    assert {greedy for _, _, greedy in halves[1]} == {True, False}
    with pytest.raises(InvalidInputError, match="no ways 'all'"):
        measure_grammars("tiny", 1, ways="all")


def test_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match="no shape 'deeper'"):
        measure_grammars("tiny", 1, shapes=("deep", "deeper"))


def test_replies_are_validated_without_the_grammar() -> None:
    assert len(TASKS) == 8
    assert len(set(SUBJECTS)) == 25
    call = '<tool_call>\n{"name": "search_flights", "arguments": {"origin": "a"}}\n</tool_call>'
    assert not TASKS["call"].follows(call)
    assert TASKS["union"].follows('{"found": true, "population": 3}')
    assert not TASKS["union"].follows('{"found": true, "error": "a"}')
    assert not TASKS["union"].follows("{")
    assert TASKS["regex"].follows("AB-1234 abc")
