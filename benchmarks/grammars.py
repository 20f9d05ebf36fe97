"""Passes for JSON under schemas, with drafts and without."""

from __future__ import annotations

import json
from typing import Any

import torch

from retrieval_draft import DraftConfig, Grammar, RetrievalDrafter
from retrieval_draft.models.loading import load_model

__all__ = ["measure_grammars"]

_NEW = 256


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_TEXT, _COUNT = {"type": "string", "maxLength": 60}, {"type": "integer", "minimum": 0, "maximum": 9999}
_PERSON = _object(name=_TEXT, age=_COUNT, email=_TEXT)
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "person": ("Describe Jane Doe, a doctor in Berlin.", _PERSON),
    "order": (
        "An order of three books and a pen by John Smith.",
        _object(customer=_PERSON, items={"type": "array", "minItems": 3, "maxItems": 4,
                                         "items": _object(product=_TEXT, quantity=_COUNT)}),
    ),
    "weather": (
        "The weather in Paris, Rome and Oslo.",
        {"type": "array", "minItems": 3, "maxItems": 3,
         "items": _object(city=_TEXT, temperature=_COUNT, sky={"enum": ["clear", "cloudy", "rainy"]})},
    ),
    "call": (
        "Call a function that searches for flights from Madrid to London.",
        _object(name={"const": "search_flights"},
                arguments=_object(origin=_TEXT, destination=_TEXT, passengers=_COUNT)),
    ),
}  # fmt: skip
"""Requests and the schemas of their replies, by name."""


def measure_grammars(model_name: str, seeds: int) -> dict[str, Any]:
    """Decodes each task greedily and with `seeds` seeds, with drafts and without, and compares the texts.

    Args:
        model_name: As for ``--model``.
        seeds: Sampled replies of each task, at a temperature of 0.8.
    """
    model, tokenizer = load_model(model_name)
    plain = RetrievalDrafter.for_model(model, tokenizer, method="none")
    tasks: dict[str, Any] = {}
    for name, (request, schema) in TASKS.items():
        # A new drafter for each task: what it drafts from is this request and those of the same task.
        drafter = RetrievalDrafter.for_model(model, tokenizer, config=DraftConfig(max_nodes=32))
        grammar = Grammar.json_schema(schema)
        chat = [{"role": "user", "content": f"{request} Answer in JSON."}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ways: list[dict[str, Any]] = [{"do_sample": False}]
        ways += [{"do_sample": True, "temperature": 0.8, "seed": seed} for seed in range(seeds)]
        counts = {"steps": 0, "plain_steps": 0, "tokens": 0, "equal": 0, "finished": 0}
        for way in ways:
            given = {**inputs, "grammar": grammar, "max_new_tokens": _NEW, **way}
            expected, drafted = plain.generate(**given), drafter.generate(**given)
            assert plain.last_stats is not None
            assert drafter.last_stats is not None
            counts["plain_steps"] += plain.last_stats.steps
            counts["steps"] += drafter.last_stats.steps
            counts["tokens"] += drafter.last_stats.tokens
            counts["equal"] += int(torch.equal(expected, drafted))
            reply = tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            counts["finished"] += int(_is_json(reply))
        ratio = counts["plain_steps"] / counts["steps"]
        tasks[name] = {"replies": len(ways), **counts, "fewer_passes": round(ratio, 2)}
    return {"model": model_name, "tasks": tasks}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
