"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct, field
from msgspec.json import Decoder

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import decode_field, is_absent
from retrieval_draft.server.openai.generation_request import (
    OFF,
    ContentPart,
    GenerationFields,
    content_of,
    refuse,
    with_raw_fields,
)
from retrieval_draft.server.openai.tools import TOOL_CHOICE_SCHEMA, TOOLS_SCHEMA, ToolUse, tool_use

__all__ = ["CHAT", "ChatRequest", "Message"]

_MAX_MESSAGES = 4096
_MAX_ARGUMENTS = 1 << 20
_MAX_VARIABLES = 16 << 10


class _Function(Struct):
    """A call of a function, its arguments as JSON text."""

    name: str
    arguments: str = "{}"


class _ToolCall(Struct):
    """A call of a tool that the assistant made."""

    function: _Function
    id: str | None = None
    type: str = "function"


class Message(Struct, forbid_unknown_fields=True):
    """A message of a conversation, with the fields of replies that clients send back."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    refusal: str | None = None
    function_call: Raw = field(default_factory=Raw)
    audio: Raw = field(default_factory=Raw)
    annotations: Raw = field(default_factory=Raw)
    cache_control: Raw = field(default_factory=Raw)


class _GenerationConfig(Struct, forbid_unknown_fields=True):
    """Options of transformers, as ``transformers chat`` sends those that differ from its defaults."""

    do_sample: bool | None = None
    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.001, le=100)] | None = None
    transformers_version: str | None = None


_CONFIG = Decoder(_GenerationConfig)
_CONFIG_TEXT = Decoder(str)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MESSAGES = Decoder(Annotated[list[Message], Meta(min_length=1, max_length=_MAX_MESSAGES)])
_VARIABLES = Decoder(dict[str, Any])
_PASSED_ON = ("role", "name", "tool_call_id", "reasoning_content", "reasoning", "thinking", "refusal")


_REFUSED: Mapping[str, Collection[bytes]] = {
    **dict.fromkeys(
        ("functions", "audio", "web_search_options", "chat_template", "suffix", "add_special_tokens",
         "moderation", "media_io_kwargs", "mm_processor_kwargs"), OFF),
    "function_call": (b'"none"', b'"auto"', *OFF),
    "modalities": (b'["text"]', *OFF),
    "verbosity": (b'"medium"', *OFF),
}  # fmt: skip
"""Fields that are not supported, with the values that change nothing."""

if TYPE_CHECKING:
    _Fields = GenerationFields
else:
    _Fields = with_raw_fields(GenerationFields, *_REFUSED)


class ChatRequest(_Fields):
    """A conversation to continue.

    Attributes:
        messages: The conversation; read by `conversation`.
        max_tokens: Of the reply; the older name.
        max_completion_tokens: The same.
        logprobs: Whether tokens come with log probabilities.
        top_logprobs: Number of alternatives of each token to return.
        add_generation_prompt: Extension of vLLM: whether the prompt ends with the start of an assistant
            message.
        continue_final_message: Extension of vLLM: whether the reply continues the last message.
        echo: Extension of vLLM: whether the reply begins with the last message, where that has its role.
        best_of: Extension of vLLM: samples to draw, of which the `n` most probable are returned.
        chat_template_kwargs: Extension of vLLM: variables of the chat template.
        tools: Functions that the model may call; read by `tool_use`.
        tool_choice: Whether it calls any; read by `tool_use`.
        parallel_tool_calls: Whether it may call several.
        reasoning_effort: A variable of the chat template, where it has one.
        generation_config: Extension of ``transformers serve``: options in place of absent fields, as an
            object or its JSON text.
    """

    messages: Annotated[
        Raw,
        Meta(
            extra_json_schema={
                "type": "array",
                "minItems": 1,
                "items": {"$ref": "#/components/schemas/Message"},
            }
        ),
    ]
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    chat_template_kwargs: Raw = field(default_factory=Raw)
    parallel_tool_calls: bool | None = None
    tools: Annotated[Raw, Meta(extra_json_schema=TOOLS_SCHEMA)] = field(default_factory=Raw)
    tool_choice: Annotated[Raw, Meta(extra_json_schema=TOOL_CHOICE_SCHEMA)] = field(default_factory=Raw)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    generation_config: Annotated[Raw, Meta(extra_json_schema={"type": ["object", "string"]})] = field(
        default_factory=Raw
    )

    def check(self) -> None:
        """Refuses unsupported fields and values.

        Raises:
            ApiError: Names the field.
        """
        self._read_config()
        self.check_common(self.wanted_tokens)
        refuse(self, _REFUSED)
        self.check_best_of(self.best_of)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", "top_logprobs")
        if self.add_generation_prompt and self.continue_final_message:
            raise ApiError(
                400,
                "continue_final_message goes on with the last message, add_generation_prompt behind it.",
                "continue_final_message",
            )

    def _read_config(self) -> None:
        name, raw = "generation_config", self.generation_config
        if is_absent(raw, b"{}"):
            return
        if len(memoryview(raw)) > _MAX_VARIABLES:
            raise ApiError(400, f"{name} has more than {_MAX_VARIABLES} bytes.", name)
        if bytes(raw).lstrip().startswith(b'"'):
            raw = Raw(decode_field(raw, _CONFIG_TEXT, name).encode("utf-8", "replace"))
        given = decode_field(raw, _CONFIG, name)
        if given.do_sample is False:
            given.temperature = 0.0
        for option in _SAMPLING:
            if getattr(self, option) is None:
                setattr(self, option, getattr(given, option))
        if self.wanted_tokens is None:
            self.max_tokens = given.max_new_tokens

    @property
    def wanted_tokens(self) -> int | None:
        """Limit of the reply's tokens, if the request has one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def variables(self) -> dict[str, Any]:
        """Variables of the chat template besides `reasoning_effort`.

        Raises:
            ApiError: They are no object, or too long.
        """
        raw, name = self.chat_template_kwargs, "chat_template_kwargs"
        if is_absent(raw, b"{}"):
            return {}
        if len(memoryview(raw)) > _MAX_VARIABLES:
            raise ApiError(400, f"{name} has more than {_MAX_VARIABLES} bytes.", name)
        return decode_field(raw, _VARIABLES, name)

    @property
    def tool_use(self) -> ToolUse | None:
        """Tools that the reply may call; None for none.

        Raises:
            ApiError: They are invalid.
        """
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Messages for a chat template: content as text, or as parts with images; arguments as objects.

        Raises:
            ApiError: A message is invalid, or there are too many.
        """
        encoded = bytes(self.messages)
        for name, what in ((b'"role"', "messages"), (b'"function"', "calls of tools")):
            if encoded.count(name) > _MAX_MESSAGES:
                raise ApiError(400, f"messages has more than {_MAX_MESSAGES} {what}.", "messages")
        return [_plain(each) for each in decode_field(self.messages, _MESSAGES, "messages")]


CHAT = Decoder(ChatRequest)
"""Decodes a body."""


def _plain(message: Message) -> dict[str, Any]:
    for name in ("function_call", "audio"):
        if not is_absent(getattr(message, name)):
            raise ApiError(
                400, f"messages: {name} is not supported by this server; leave it out.", "messages"
            )
    fields = {name: value for name in _PASSED_ON if (value := getattr(message, name)) is not None}
    fields["content"] = content_of(message.content)
    if message.tool_calls:
        fields["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return fields


def _tool_call(call: _ToolCall) -> dict[str, Any]:
    """A call in the form of chat templates: OpenAI's arguments are JSON text, theirs an object."""
    arguments: Any = call.function.arguments
    if len(arguments) > _MAX_ARGUMENTS:
        raise ApiError(
            400, f"The arguments of a tool call have more than {_MAX_ARGUMENTS} bytes.", "messages"
        )
    with suppress(msgspec.DecodeError, RecursionError):  # text that is no object stays as it is
        arguments = _VARIABLES.decode(arguments)
    function = {"name": call.function.name, "arguments": arguments}
    plain: dict[str, Any] = {"type": call.type, "function": function}
    return plain if call.id is None else {"id": call.id, **plain}
