"""Fields that completions and chat completions share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Raw, Struct, defstruct, field
from msgspec.json import Decoder

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import decode_field, decode_texts, is_absent

__all__ = [
    "OFF",
    "UNSUPPORTED",
    "ContentPart",
    "GenerationFields",
    "Ids",
    "ImageUrl",
    "Prediction",
    "ReplyFields",
    "Speculative",
    "StreamOptions",
    "TokenId",
    "content_of",
    "refuse",
    "text_of",
    "with_raw_fields",
]

TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Ids = Annotated[list[TokenId], Meta(min_length=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Salt = Annotated[str, Meta(min_length=1, max_length=1024)]
Word = Annotated[str, Meta(min_length=1, max_length=256)]
Bias = dict[
    Annotated[str, Meta(pattern=r"^[0-9]{1,9}$(?!\n)")],
    Annotated[float, Meta(ge=-100, le=100)],
]
_BIAS = Decoder(Bias)
_STOPS = Decoder(list[Stop])
_DOCUMENTS = Decoder(list[str])
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_MAX_BIASED, _MAX_STOPS, _MAX_DOCUMENTS = 1024, 16, 64
_MAX_WORDS = 64
OFF = (b"false", b"[]", b"{}", b'""')
"""Values of a field that turn nothing on, as JSON."""

UNSUPPORTED = "is not supported by this server"


def with_raw_fields(base: type[Struct], *names: str) -> type[Struct]:
    """A body with the fields of `base`, and more that are left undecoded."""
    fields = [(name, Raw, field(default_factory=Raw)) for name in names]
    return defstruct("_Fields", fields, bases=(base,), forbid_unknown_fields=True, kw_only=True)


def refuse(body: Struct, fields: Mapping[str, Collection[bytes]]) -> None:
    """Refuses unsupported fields that would change the reply.

    Args:
        body: Of the request.
        fields: Names of fields that were left raw, and values that change nothing besides null, as JSON.

    Raises:
        ApiError: One of them is set.
    """
    for name, neutral in fields.items():
        if not is_absent(getattr(body, name), *neutral):
            raise ApiError(400, f"{name} {UNSUPPORTED}; leave it out.", name)


class ImageUrl(Struct):
    """The URL of a file. `detail` of images is accepted: the model's processor alone decides on sizes."""

    url: str
    detail: str | None = None


class InputAudio(Struct):
    """A sound in base64."""

    data: str
    format: str


class ContentPart(Struct):
    """A part of a message: text, or in chats an image or a sound. `audio_url` is vLLM's."""

    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None
    input_audio: InputAudio | None = None
    audio_url: ImageUrl | str | None = None

    @property
    def media(self) -> dict[str, Any] | None:
        """The part of an image or a sound, with its URL; None for other types.

        Raises:
            ApiError: It has none, or is of another format than is read.
        """
        if self.type not in ("image_url", "input_audio", "audio_url"):
            return None
        given = getattr(self, self.type)
        if given is None:
            raise ApiError(400, f"A content part of type {self.type!r} has no {self.type}.", "messages")
        if isinstance(given, InputAudio):
            if given.format != "wav":
                raise ApiError(400, f"input_audio: format is {given.format[:16]!r}; send wav.", "messages")
            given = f"data:audio/wav;base64,{given.data}"
        kind = "image" if self.type == "image_url" else "audio"
        return {"type": kind, "url": given if isinstance(given, str) else given.url}


class Prediction(Struct, forbid_unknown_fields=True):
    """Expected text of the reply."""

    content: str | list[ContentPart]
    type: Literal["content"] = "content"


class Speculative(Struct, forbid_unknown_fields=True):
    """Drafting for one request."""

    enabled: bool | None = None
    max_draft_tokens: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None


class StreamOptions(Struct, forbid_unknown_fields=True):
    """Options of streams. `include_obfuscation`, padding against eavesdroppers, is not supported."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ReplyFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """Sampling, limits and extensions of every request for a reply.

    Attributes:
        model: The served model's name.
        temperature: 0 is greedy; None for the model's own default, or 1.
        top_p: Nucleus sampling.
        top_k: Extension: most probable tokens to sample from; 0 for all.
        repetition_penalty: Extension, as of transformers.
        logit_bias: Added to the logits of tokens, by id.
        seed: The same seed gives the same reply.
        stop: Strings at which the reply ends.
        skip_special_tokens: Extension of vLLM: whether special tokens are left out of the text.
        include_stop_str_in_output: Extension of vLLM: whether the reply ends with the stop string or token.
        stream: Whether tokens are sent as they are decoded.
        speculative: Extension: whether drafts are made, and how many tokens a step.
        prediction: Expected text of the reply; a draft source of this request.
        share: Extension: parts of this request that other servers may learn.
        ignore_eos: Extension: whether the reply continues to its limit.
        priority: Extension of vLLM: requests with lower numbers come first, among those of a tenant.
        cache_salt: Extension of vLLM: only texts of requests with the same salt are continued.
        structured_outputs: Extension of vLLM: the grammar of the reply.
    """

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.001, le=100)] | None = None
    logit_bias: Annotated[Raw, Meta(extra_json_schema={"type": "object"})] = field(default_factory=Raw)
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Annotated[Raw, Meta(extra_json_schema=_TEXTS)] = field(default_factory=Raw)
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    speculative: Speculative | None = None
    prediction: Prediction | None = None
    share: Literal["none", "reply", "all"] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)] | None = None
    cache_salt: Salt | None = None
    structured_outputs: Raw = field(default_factory=Raw)


_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options", "cache_prompt", "request_id", "session_id",
)  # fmt: skip
"""Fields that do not change the reply."""

_REFUSED: Mapping[str, Collection[bytes]] = {
    **dict.fromkeys(
        ("use_beam_search", "early_stopping", "prompt_logprobs", "truncate_prompt_tokens",
         "return_tokens_as_token_ids", "logits_processors", "truncation_side", "logprob_token_ids",
         "watermarking", "repetition_detection", "return_prompt_text", "return_token_offsets",
         "kv_transfer_params", "ec_transfer_params", "vllm_xargs"), OFF),
    **dict.fromkeys(("spaces_between_special_tokens", "include_reasoning", "return_mm_kwargs"), (b"true",)),
    "thinking_token_budget": (b"-1",),
    "stream_interval": (b"1",),
    "routed_experts_prompt_start": (b"0", *OFF),
    **dict.fromkeys(("length_penalty", "typical_p"), (b"1", b"1.0", *OFF)),
}  # fmt: skip
"""Fields that would change it and are not supported, with the values that change nothing."""

_GRAMMARS = (
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "grammar", "json_schema",
    "response_format",
)  # fmt: skip
"""Fields besides `structured_outputs` that ask for a grammar (`structured_outputs.asked_grammar`)."""

if TYPE_CHECKING:  # fields that are left undecoded are read by their names alone
    _Fields = ReplyFields
else:
    _Fields = with_raw_fields(ReplyFields, *_GRAMMARS, *_IGNORED, *_REFUSED)


class GenerationFields(_Fields, forbid_unknown_fields=True, kw_only=True):
    """Sampling, limits and extensions of completions and chats.

    A field that is neither here nor in the tables above is refused by name.

    Attributes:
        min_p: Extension: least probability, relative to the best token's.
        presence_penalty: Subtracted from the logits of tokens in the reply.
        frequency_penalty: Subtracted for each of their occurrences.
        n: Choices.
        min_tokens: Extension of vLLM: the reply does not end by itself before.
        stop_token_ids: Extension of vLLM: tokens that end the reply, and are no part of its text.
        bad_words: Extension of vLLM: texts that the reply does not have.
        allowed_token_ids: Extension of vLLM: only these are generated.
        stream_options: Options of the stream.
        documents: Extension: texts that the reply may quote; draft sources of this request.
        metrics: Extension: whether the response has drafting counts.
        draft_marks: Extension: whether each piece of a stream marks its drafted text.
        return_token_ids: Extension: whether the response has the token ids.
    """

    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop_token_ids: list[TokenId] | None = None
    bad_words: list[Word] | None = None
    allowed_token_ids: Ids | None = None
    stream_options: StreamOptions | None = None
    documents: Annotated[Raw, Meta(extra_json_schema=_TEXTS)] = field(default_factory=Raw)
    metrics: bool | None = None
    draft_marks: bool | None = None
    return_token_ids: bool | None = None

    @property
    def bias(self) -> dict[int, float]:
        """`logit_bias` by token id.

        Raises:
            ApiError: It is no object, or too long.
        """
        if is_absent(self.logit_bias, b"{}"):
            return {}
        if bytes(self.logit_bias).count(b":") > _MAX_BIASED:
            raise ApiError(400, f"logit_bias has more than {_MAX_BIASED} entries.", "logit_bias")
        return {
            int(token): bias for token, bias in decode_field(self.logit_bias, _BIAS, "logit_bias").items()
        }

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list.

        Raises:
            ApiError: They have another type, or are too many.
        """
        return [] if is_absent(self.stop, b"[]") else decode_texts(self.stop, _STOPS, "stop", _MAX_STOPS)

    @property
    def references(self) -> list[str]:
        """The documents as a list.

        Raises:
            ApiError: They have another type, or are too many.
        """
        if is_absent(self.documents, b"[]"):
            return []
        return decode_texts(self.documents, _DOCUMENTS, "documents", _MAX_DOCUMENTS)

    @property
    def predicted(self) -> str | None:
        """The prediction's text."""
        return None if self.prediction is None else text_of(self.prediction.content, "prediction")

    @property
    def max_draft_tokens(self) -> int | None:
        """Limit of a step's draft tokens; None for none."""
        asked = self.speculative
        if asked is None:
            return None
        return 0 if asked.enabled is False else asked.max_draft_tokens

    @property
    def includes_usage(self) -> bool:
        """True if a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def options(self, top_k: int | None) -> dict[str, Any]:
        """Equivalent keyword arguments for `RetrievalDrafter.generate`.

        Args:
            top_k: Of the model's own generation configuration.
        """
        wanted: dict[str, Any] = {"do_sample": self.temperature is None or self.temperature >= 1e-5}
        if wanted["do_sample"]:
            wanted |= {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}
            # transformers would use 50 by default.
            wanted["top_k"] = max(self.top_k if self.top_k is not None else top_k or 0, 0)
        wanted["repetition_penalty"] = self.repetition_penalty
        wanted["min_new_tokens"] = self.min_tokens or None
        if bias := self.bias:
            wanted["sequence_bias"] = {(token,): each for token, each in bias.items()}
        return {name: value for name, value in wanted.items() if value is not None}

    def check_common(self, max_tokens: int | None) -> None:
        """Refuses fields that neither endpoint supports.

        Args:
            max_tokens: Limit of the reply in the request.

        Raises:
            ApiError: Names the field.
        """
        refuse(self, _REFUSED)
        least = self.min_tokens or 0
        if max_tokens is not None and least > max_tokens:
            raise ApiError(400, f"min_tokens is {least}, and max_tokens {max_tokens}.", "min_tokens")
        for name, given, most in (
            ("stop_token_ids", self.stop_token_ids, _MAX_BIASED),
            ("bad_words", self.bad_words, _MAX_WORDS),
        ):
            if given is not None and len(given) > most:
                raise ApiError(400, f"{name} has {len(given)} entries; {most} are allowed.", name)

    def check_best_of(self, best_of: int | None) -> None:
        """Refuses samples that cannot compete.

        Args:
            best_of: Samples to draw.

        Raises:
            ApiError: There are too few, they are streamed, or they are all the same.
        """
        if best_of is None:
            return
        if best_of < (self.n or 1):
            raise ApiError(400, f"best_of is {best_of}; it must be at least n.", "best_of")
        if self.stream and best_of > (self.n or 1):
            raise ApiError(400, "The best samples are known at the end only; do not stream.", "best_of")
        if best_of > 1 and self.temperature is not None and self.temperature < 1e-5:
            raise ApiError(400, "Greedy decoding has one sample; set a temperature.", "best_of")


def text_of(content: str | list[ContentPart] | None, param: str) -> str:
    """The text of a message's content.

    Raises:
        ApiError: A part is no text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for part in content:
        if (
            part.type not in ("text", "input_text", "output_text", "reasoning_text", "refusal")
            or part.text is None
        ):
            kind = part.type[:64]
            raise ApiError(400, f"A content part of type {kind!r} {UNSUPPORTED}; use text.", param)
    return "".join(part.text or "" for part in content)


def content_of(content: str | list[ContentPart] | None) -> str | list[dict[str, Any]]:
    """The content of a message for a chat template: text, or parts where there are images or sounds.

    Raises:
        ApiError: A part is neither text nor an image or a sound.
    """
    media = [part.media for part in content] if isinstance(content, list) else []
    if not isinstance(content, list) or not any(media):
        return text_of(content, "messages")
    return [
        found or {"type": "text", "text": text_of([part], "messages")}
        for part, found in zip(content, media, strict=True)
    ]
