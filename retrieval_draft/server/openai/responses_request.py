"""The body of POST /v1/responses, and the chat that it stands for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct, field
from msgspec.json import Decoder, encode

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import decode_field, is_absent
from retrieval_draft.server.openai.chat_request import ChatRequest
from retrieval_draft.server.openai.generation_request import (
    UNSUPPORTED,
    ContentPart,
    ReplyFields,
    refuse,
    text_of,
    with_raw_fields,
)

__all__ = ["RESPONSES", "ResponsesRequest", "named_as_here"]

_MAX_ITEMS = 4096
_INPUT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "object"}}]}
_CHAT_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning",
    "response_format": "text",
}
"""Names here of a chat's fields."""


class _Message(Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class _Call(Struct, forbid_unknown_fields=True):
    call_id: str
    name: str
    arguments: str
    type: Literal["function_call"]
    id: str | None = None
    status: str | None = None


class _Output(Struct, forbid_unknown_fields=True):
    call_id: str
    output: str | list[ContentPart]
    type: Literal["function_call_output"]
    id: str | None = None
    status: str | None = None


class _Reasoning(Struct, forbid_unknown_fields=True):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[ContentPart] | None = None
    status: str | None = None
    encrypted_content: None = None


_ITEMS: dict[str, Any] = {
    "message": _Message,
    "function_call": _Call,
    "function_call_output": _Output,
    "reasoning": _Reasoning,
}


class _Tool(Struct, forbid_unknown_fields=True):
    name: str
    type: Literal["function"] = "function"
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Choice(Struct, forbid_unknown_fields=True, tag="function"):
    name: str

    @property
    def of_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": self.name}}


class _AllowedTool(Struct, forbid_unknown_fields=True):
    name: str
    type: Literal["function"] = "function"


class _Allowed(Struct, forbid_unknown_fields=True, tag="allowed_tools"):
    mode: Literal["auto", "required"]
    tools: list[_AllowedTool]

    @property
    def of_chat(self) -> dict[str, Any]:
        named = [{"type": "function", "function": {"name": tool.name}} for tool in self.tools]
        return {"type": "allowed_tools", "allowed_tools": {"mode": self.mode, "tools": named}}


class _ReasoningOptions(Struct, forbid_unknown_fields=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: None = None
    generate_summary: None = None
    mode: Literal["standard"] | None = None
    context: Literal["auto"] | None = None


class _Format(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class _TextOptions(Struct, forbid_unknown_fields=True):
    format: _Format | None = None
    verbosity: Literal["medium"] | None = None


_ITEM_LIST = Decoder(list[dict[str, Any]])
_TEXT = Decoder(str)
_TOOLS = Decoder(list[_Tool])
_CHOICE = Decoder(Literal["none", "auto", "required"] | _Choice | _Allowed)


_IGNORED = (
    "user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "request_id",
)  # fmt: skip
"""Fields that do not change the reply."""

_NOTHING = (b"[]", b"{}")
_REFUSED: Mapping[str, Collection[bytes]] = {
    **dict.fromkeys(
        ("previous_response_id", "conversation", "background", "include", "prompt"), (b"false", *_NOTHING)),
    "truncation": (b'"disabled"', *_NOTHING),
    "top_logprobs": (b"0", *_NOTHING),
    **dict.fromkeys(
        ("max_tool_calls", "stream_options", "context_management", "moderation", "background_options",
         "access_programs", "image", "enable_response_messages", "previous_input_messages",
         "previous_response", "mm_processor_kwargs", "vllm_xargs"), (b"false", *_NOTHING)),
}  # fmt: skip
"""Fields that would change it and are not supported, with the values that change nothing."""

if TYPE_CHECKING:
    _Fields = ReplyFields
else:
    _Fields = with_raw_fields(ReplyFields, *_IGNORED, *_REFUSED)


class ResponsesRequest(_Fields, forbid_unknown_fields=True, kw_only=True):
    """A conversation to continue; the server keeps nothing of it.

    Attributes:
        input: A text, or items of a conversation; read by `chat`.
        instructions: A system message in front of it.
        max_output_tokens: Of the reply.
        parallel_tool_calls: As in chats, as `chat_template_kwargs`.
        text: Form of the text.
        reasoning: Options of the reasoning.
        tools: Functions that the model may call.
        tool_choice: Whether it calls any.
        store: Whether the response can be fetched later: never.
        metadata: Repeated in the response.
    """

    input: Annotated[Raw, Meta(extra_json_schema=_INPUT_SCHEMA)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    text: _TextOptions | None = None
    reasoning: _ReasoningOptions | None = None
    tools: Annotated[Raw, Meta(extra_json_schema={"type": "array"})] = field(default_factory=Raw)
    tool_choice: Raw = field(default_factory=Raw)
    store: bool | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: Raw = field(default_factory=Raw)

    def check(self) -> None:
        """Refuses unsupported fields.

        Raises:
            ApiError: Names the field.
        """
        refuse(self, _REFUSED)
        if self.store:
            raise ApiError(400, "store is true; this server stores no responses.", "store")

    @property
    def chat(self) -> ChatRequest:
        """The chat that this stands for.

        Raises:
            ApiError: An item or a tool is invalid or not supported.
        """
        given: dict[str, Any] = {}
        if self.text is not None and self.text.format is not None and self.text.format.type != "text":
            form = self.text.format
            schema = {"name": form.name or "reply", "schema": form.schema, "strict": form.strict}
            wanted = {"type": form.type} | ({"json_schema": schema} if form.type == "json_schema" else {})
            given["response_format"] = Raw(encode(wanted))
        if self.reasoning is not None:
            given["reasoning_effort"] = self.reasoning.effort
        if not is_absent(self.tools, b"[]"):
            given["tools"] = Raw(encode([_nested(tool) for tool in self.functions]))
        choice = (
            None if is_absent(self.tool_choice) else decode_field(self.tool_choice, _CHOICE, "tool_choice")
        )
        if choice is not None:
            given["tool_choice"] = Raw(encode(choice if isinstance(choice, str) else choice.of_chat))
        return ChatRequest(
            messages=Raw(encode(self._messages())),
            max_completion_tokens=self.max_output_tokens,
            parallel_tool_calls=self.parallel_tool_calls,
            chat_template_kwargs=self.chat_template_kwargs,
            **{name: getattr(self, name) for name in ReplyFields.__struct_fields__},
            **given,
        )

    @property
    def functions(self) -> list[Any]:
        """The tools.

        Raises:
            ApiError: One is no function.
        """
        return [] if is_absent(self.tools, b"[]") else decode_field(self.tools, _TOOLS, "tools")

    @property
    def echoed(self) -> dict[str, Any]:
        """Fields of the request that its response repeats."""
        choice = "auto" if is_absent(self.tool_choice) else msgspec.json.decode(self.tool_choice)
        form = None if self.text is None else self.text.format
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": None if self.reasoning is None else self.reasoning.effort,
                "summary": None,
            },
            "store": False,
            "temperature": self.temperature,
            "text": {"format": {"type": "text"} if form is None else msgspec.to_builtins(form)},
            "tool_choice": choice,
            "tools": [msgspec.to_builtins(tool) for tool in self.functions],
            "top_p": self.top_p,
            "truncation": "disabled",
        }

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if bytes(self.input).startswith(b'"'):
            return [*messages, {"role": "user", "content": decode_field(self.input, _TEXT, "input")}]
        items = decode_field(self.input, _ITEM_LIST, "input")
        if not 0 < len(items) <= _MAX_ITEMS:
            raise ApiError(400, f"input has {len(items)} items; it must have 1 to {_MAX_ITEMS}.", "input")
        for index, each in enumerate(items):
            _append(messages, _item(each, index))
        return messages


RESPONSES = Decoder(ResponsesRequest)
"""Decodes a body."""


@contextmanager
def named_as_here() -> Iterator[None]:
    """Errors about fields of the chat name those of the request."""
    try:
        yield
    except ApiError as error:
        error.param = _CHAT_NAMES.get(error.param or "", error.param)
        raise


def _item(given: dict[str, Any], index: int) -> Any:
    kind = given.get("type", "message")
    if not isinstance(kind, str) or kind not in _ITEMS:
        raise ApiError(400, f"input[{index}]: an item of type {str(kind)[:64]!r} {UNSUPPORTED}.", "input")
    try:
        return msgspec.convert(given, _ITEMS[kind])
    except msgspec.ValidationError as error:
        raise ApiError(400, f"input[{index}]: {error}.", "input") from error


def _append(messages: list[dict[str, Any]], item: Any) -> None:
    """Adds an item; reasoning, content and calls of one turn are one message of a chat."""
    if isinstance(item, _Output):
        content = text_of(item.output, "input")
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
        return
    if isinstance(item, _Message) and item.role != "assistant":
        messages.append({"role": item.role, "content": text_of(item.content, "input")})
        return
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or (isinstance(item, _Reasoning | _Message) and "content" in last):
        messages.append({"role": "assistant"})
        last = messages[-1]
    if isinstance(item, _Message):
        last["content"] = text_of(item.content, "input")
    elif isinstance(item, _Reasoning):
        if item.content:
            last["reasoning_content"] = text_of(item.content, "input")
    else:
        call = {"id": item.call_id, "type": "function"}
        function = {"name": item.name, "arguments": item.arguments}
        last.setdefault("tool_calls", []).append({**call, "function": function})


def _nested(tool: Any) -> dict[str, Any]:
    fields = {name: value for name, value in msgspec.to_builtins(tool).items() if value is not None}
    del fields["type"]
    return {"type": "function", "function": fields}
