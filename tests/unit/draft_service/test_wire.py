from __future__ import annotations

import math
import tracemalloc
from typing import Any

import msgspec
import pytest

from retrieval_draft.draft_service import wire


def packed(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(fields)


def test_a_step_is_what_it_was_in_version_1() -> None:
    """Engines of other languages write this by hand: it must not change under them."""
    step = wire.Step(session="s", tokens=[1, 300], at=7, nodes=16, close="finished")
    assert wire.encode(wire.StepRequest(steps=[step]), json=True) == (
        b'{"steps":[{"nodes":16,"session":"s","tokens":[1,300],"at":7,"close":"finished"}]}'
    )
    opened = wire.OpenReply("s", wire.Draft([5, 6], [-1, 0], [1.0, 0.5], length=3))
    assert wire.encode(opened, json=True) == (
        b'{"session":"s","draft":{"tokens":[5,6],"parents":[-1,0],"path_probs":[1.0,0.5],"length":3},"version":1}'
    )
    assert wire.VERSION == 1


@pytest.mark.parametrize("json", [False, True])
def test_messages_come_back(json: bool) -> None:
    top_logprobs = wire.TopLogprobs([[1, 2]], [[0.5, 0.25]], [0])
    request = wire.StepRequest(
        steps=[wire.Step(session="a", top_logprobs=top_logprobs, max_depth=3, chain=True, min_prob=0.25)]
    )
    assert wire.decode(wire.encode(request, json), wire.StepRequest, json) == request


@pytest.mark.parametrize("json", [False, True])
def test_former_field_names_are_read(json: bool) -> None:
    top = {"tokens": [[1, 2]], "probs": [[0.5, 0.25]]}
    old = {"session": "a", "tokens": [4], "deepest": 3, "chain": True, "floor": 0.25, "said": top}
    body = msgspec.json.encode({"steps": [old]}) if json else packed(steps=[old])
    (step,) = wire.decode(body, wire.StepRequest, json).steps
    assert (step.max_depth, step.min_prob, step.deepest, step.floor, step.said) == (3, 0.25, None, None, None)
    assert step.top_logprobs == wire.TopLogprobs([[1, 2]], [[0.5, 0.25]])
    assert b"deepest" not in wire.encode(wire.StepRequest(steps=[step]), json)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "length >= 1"),
        ({"prompt": [-1]}, ">= 0"),
        ({"prompt": [1 << 31]}, "<= 2147483647"),
        ({"prompt": [1.5]}, "Expected `int`"),
        ({"prompt": [True]}, "Expected `int`"),
        ({"prompt": [1], "prompts": [1]}, "unknown field"),
        ({"prompt": [1], "version": 2}, "version"),
        ({"prompt": [1], "share": "everything"}, "share"),
        ({"prompt": [1], "nodes": 1025}, "<= 1024"),
        ({"prompt": [1], "floor": math.nan}, "floor"),
        ({"prompt": [1], "floor": 1.5}, "<= 1.0"),
        ({"prompt": "text"}, "array"),
    ],
)
def test_what_is_no_message_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(msgspec.DecodeError, match=message):
        wire.decode(packed(**fields), wire.OpenRequest)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises((msgspec.DecodeError, RecursionError)):
        wire.decode(b"\x91" * 100_000, wire.StepRequest)
    with pytest.raises((msgspec.DecodeError, RecursionError)):
        wire.decode(b'{"x":' * 100_000, wire.StepRequest, json=True)


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize("name", ["prompt", "references", "said"])
def test_a_large_message_is_bounded_before_it_is_made(name: str, json: bool) -> None:
    packer: Any = msgspec.json if json else msgspec.msgpack
    body = {
        "prompt": lambda: {"prompt": [1] * (wire.MAX_TEXT + 2)},
        "references": lambda: {"prompt": [1], "references": [[]] * 1_000_000},
        "said": lambda: {"steps": [{"session": "a", "said": {"tokens": [[1]] * 1_000_000, "probs": []}}]},
    }[name]()
    packed = packer.encode(body)
    kind: Any = wire.StepRequest if name == "said" else wire.OpenRequest
    tracemalloc.start()
    try:
        with pytest.raises(msgspec.ValidationError):
            wire.decode(packed, kind, json)
        assert tracemalloc.get_traced_memory()[1] < 5 * len(packed)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("json", [False, True])
def test_large_messages_are_what_small_ones_are(json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SMALL", 0)
    opened = wire.OpenRequest(prompt=[1, 2], references=[[3], []], nodes=4, fingerprint="f", share="all")
    top_logprobs = wire.TopLogprobs([[1], [2]], [[0.5], [0.25]], nodes=[0, 1])
    steps = wire.StepRequest(
        steps=[wire.Step(session="a", tokens=[1, 2], at=3, top_logprobs=top_logprobs), wire.Step(session="b")]
    )
    assert wire.decode(wire.encode(opened, json), wire.OpenRequest, json) == opened
    assert wire.decode(wire.encode(steps, json), wire.StepRequest, json) == steps
