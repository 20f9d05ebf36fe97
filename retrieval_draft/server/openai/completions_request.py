"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Raw, field
from msgspec.json import Decoder

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import decode_field, decode_texts
from retrieval_draft.server.openai.generation_request import OFF, GenerationFields, Ids, refuse

__all__ = ["COMPLETION", "CompletionRequest"]

_TEXT = Decoder(str)
_TEXTS = Decoder(list[str])
_IDS = Decoder(Ids)
_LISTS = Decoder(Annotated[list[Ids], Meta(min_length=1)])


_ROW = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_PROMPTS = [
    {"type": "string"},
    {"type": "array", "minItems": 1, "items": {"type": "string"}},
    _ROW,
    {"type": "array", "minItems": 1, "items": _ROW},
]


class CompletionRequest(GenerationFields):
    """A text to continue.

    Attributes:
        prompt: A text, texts, token ids, or lists of those; read by `prompts`.
        max_tokens: Of the reply.
        echo: Whether the response begins with the prompt.
        logprobs: Number of alternatives of each token to return, with log probabilities; false for none.
        best_of: Samples to draw, of which the `n` most probable are returned.
        add_special_tokens: Extension of vLLM: whether the tokenizer adds its special tokens to a text.
        suffix: Not supported, as is the one after it.
    """

    prompt: Annotated[Raw, Meta(extra_json_schema={"anyOf": _PROMPTS})]
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    add_special_tokens: bool | None = None
    suffix: Raw = field(default_factory=Raw)
    prompt_embeds: Raw = field(default_factory=Raw)

    @property
    def alternatives(self) -> int | None:
        """Number of alternatives of each token to return; None for no log probabilities."""
        return None if self.logprobs is None or isinstance(self.logprobs, bool) else self.logprobs

    def check(self) -> None:
        """Refuses unsupported fields and values.

        Raises:
            ApiError: Names the field.
        """
        self.check_common(self.max_tokens)
        refuse(self, {"suffix": OFF, "prompt_embeds": OFF})
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens is 0, which makes sense with echo only.", "max_tokens")
        if self.logprobs is True:
            raise ApiError(400, "logprobs is true; say how many alternatives to name, 0..20.", "logprobs")
        self.check_best_of(self.best_of)

    def prompts(self, most: int) -> list[Any]:
        """One text or list of ids for each prompt.

        Args:
            most: Limit of prompts.

        Raises:
            ApiError: There are more, or it has another type.
        """
        raw = bytes(self.prompt)
        within = raw[1:65].lstrip()
        if not raw.startswith(b"["):
            return [decode_field(self.prompt, _TEXT, "prompt")]
        given: list[Any]
        if within.startswith(b'"'):
            given = decode_texts(self.prompt, _TEXTS, "prompt", most)
        elif within.startswith(b"["):
            # As many lists as there may be prompts, before a million empty ones are made.
            if raw.count(b"[") - 1 > most:
                raise ApiError(400, f"prompt has more than {most} lists.", "prompt")
            given = decode_field(self.prompt, _LISTS, "prompt")
        else:
            return [decode_field(self.prompt, _IDS, "prompt")]
        if not given:
            raise ApiError(400, "prompt: the list is empty.", "prompt")
        return given


COMPLETION = Decoder(CompletionRequest)
"""Decodes a body."""
