"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.protocol.generation import ContentPart, GenerationFields, text_of

__all__ = ["ChatRequest", "Message", "ResponseFormat"]


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None


class ResponseFormat(BaseModel):
    """Only ``{"type": "text"}`` is understood."""

    model_config = ConfigDict(extra="allow")
    type: str = "text"


class ChatRequest(GenerationFields):
    """A conversation to continue.

    Attributes:
        messages: The conversation.
        max_tokens: Of the reply; the older name.
        max_completion_tokens: The same.
        logprobs: Whether tokens come with log probabilities.
        top_logprobs: How many alternatives of each to name.
        response_format: Text only.
        tools: Not supported, as are the next three.
        tool_choice: Not supported.
        functions: Not supported.
        audio: Not supported.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    audio: Any = None

    def check(self) -> None:
        """Refuses what cannot be done.

        Raises:
            ApiError: Names the field.
        """
        self.refuse("tools", "functions", "audio")
        if self.tool_choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice is not supported by this server; leave it out.", "tool_choice")
        if self.response_format is not None and self.response_format.type != "text":
            raise ApiError(
                400,
                f"response_format {self.response_format.type!r} is not supported by this server; use text.",
                "response_format",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", "top_logprobs")

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens of the reply at most, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """Messages for a chat template, their content as plain text."""
        return [
            {**message.model_dump(exclude_none=True), "content": text_of(message.content, "messages")}
            for message in self.messages
        ]
