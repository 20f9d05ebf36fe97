"""Grammars of eight shapes, their validators, and a tiny model with a tokenizer that can write them."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema_rs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from retrieval_draft import Grammar
from tests.support.models import make


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_SHORT = {"type": "string", "maxLength": 6}
_SMALL = {"type": "integer", "minimum": 0, "maximum": 150}
_DEEP: dict[str, Any] = _object(leaf={"type": "boolean"})
for _level in range(8):
    _DEEP = _object(down=_DEEP)

SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": _object(user=_object(name=_SHORT, age=_SMALL), active={"type": "boolean"}),
    "enum": _object(kind={"enum": ["cat", "catalog", "cattle", 7, None]}, unit={"const": "kg"}),
    "union": {
        "anyOf": [
            _object(ok={"const": True}, value=_SMALL),
            _object(ok={"const": False}, error=_SHORT),
        ]
    },
    "arrays": _object(tags={"type": "array", "items": _SHORT, "minItems": 1, "maxItems": 3}, n=_SMALL),
    "unicode": _object(größe=_SMALL, 名前={"enum": ["ü", "日本", "naïve"]}, é=_SHORT),
    "deep": _DEEP,
}
PATTERN = r"[A-C][a-z]{2,4}-\d{2}"
CHOICES = ["yes", "yesterday", "no", 'ja, "gern"', "日本"]
SHAPES: dict[str, Grammar] = {
    **{name: Grammar.json_schema(schema) for name, schema in SCHEMAS.items()},
    "regex": Grammar.regex(PATTERN),
    "choice": Grammar.choice(CHOICES),
}


def follows(shape: str, text: str) -> bool:
    """True if a finished text is one of its shape."""
    if shape == "regex":
        return re.fullmatch(PATTERN, text) is not None
    if shape == "choice":
        return text in CHOICES
    return bool(jsonschema_rs.is_valid(SCHEMAS[shape], json.loads(text)))


@cache
def json_tokenizer() -> Any:
    """Bytes, and pieces of JSON that cut across keys and values."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    texts = [json.dumps(schema, ensure_ascii=False) for schema in SCHEMAS.values()]
    texts += ['{"user": {"name": "Ann", "age": 3}}, {"down": {"leaf": true}}', '"tags": ["a", "b"], "']
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>", "<call>"],
    )
    made.train_from_iterator(texts * 2, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", additional_special_tokens=["<call>"]
    )


@cache
def json_model() -> Any:
    """A tiny random model of that vocabulary, its head padded."""
    tokenizer = json_tokenizer()
    return make("llama", vocab_size=len(tokenizer) + 5, eos_token_id=tokenizer.eos_token_id)
