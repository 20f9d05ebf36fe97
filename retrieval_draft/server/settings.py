"""Limits of the server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from retrieval_draft._settings import Range, check_range, check_ranges
from retrieval_draft.errors import InvalidInputError
from retrieval_draft.server.media.settings import MediaSettings

__all__ = ["REASONING_PARSERS", "TOOL_PARSERS", "ServerSettings"]

TOOL_PARSERS = ("auto", "none", "deepseek", "gemma", "gpt-oss", "hermes", "llama3", "mistral", "qwen")
REASONING_PARSERS = ("auto", "none", "deepseek", "gemma", "gpt-oss", "mistral", "qwen")
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s,?#*]+")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits for the clients of a server.

    Attributes:
        model_name: Name of the model for clients.
        max_batch: Rows decoded together.
        max_queue: Limit of waiting choices; more are refused with 429.
        max_choices: Choices of one request at most; 0 for 64, or `max_queue` where that is less.
        max_body_bytes: Limit of a request's body; larger ones are refused with 413.
        max_prompt_tokens: Limit of one prompt; the model's by default.
        max_reference_tokens: Limit of the documents and the prediction of one request.
        max_tokens: Limit of one reply, even if the request asks for more.
        max_tenants: Tenants of one server at most.
        history_bytes: Memory for the history of each tenant but the default one.
        prefill_chunk: Prompt tokens in one pass at most; other rows step between two of them. Fewer where a
            pass would delay others too long.
        request_seconds: Limit from arrival to the end of the reply.
        stuck_seconds: A step that takes longer turns /health unhealthy.
        unread_tokens: Tokens that may wait for a client that does not read its stream.
        send_seconds: Limit for sending one piece of a stream to its client.
        grace_seconds: Seconds for running requests to finish when the server stops.
        cors_origins: Web pages' origins that may use the server from a browser: https://host, or "*" for any.
        tool_parser: Form of the model's calls of tools: a family's name, none, or auto for as its chat
            template shows.
        reasoning_parser: Marks around its reasoning: a family's name, none or auto.
        tenant_weights: Shares of tenants while several wait: 2 for twice that of others, 1 by default.
        max_cache_bytes: Limit of the memory for keys and values of all that run; what does not fit waits.
        media: Sources of images, and their limits.
    """

    model_name: str
    max_batch: Annotated[int, Range(1, 1024)] = 8
    max_queue: Annotated[int, Range(1, 1 << 20)] = 256
    max_choices: Annotated[int, Range(0, 1 << 20)] = 0
    max_body_bytes: Annotated[int, Range(1024, 1 << 32)] = 4 << 20
    max_prompt_tokens: Annotated[int | None, Range(1, 1 << 30)] = None
    max_reference_tokens: Annotated[int, Range(0, 1 << 30)] = 65536
    max_tokens: Annotated[int, Range(1, 1 << 30)] = 4096
    max_tenants: Annotated[int, Range(1, 4096)] = 64
    history_bytes: Annotated[int, Range(1 << 20, 1 << 40)] = 1 << 26
    prefill_chunk: Annotated[int, Range(1, 1 << 20)] = 512
    request_seconds: Annotated[float, Range(0.01, 1 << 20)] = 600.0
    stuck_seconds: Annotated[float, Range(0.01, 1 << 20)] = 120.0
    unread_tokens: Annotated[int, Range(1, 1 << 30)] = 65536
    send_seconds: Annotated[float, Range(0.01, 1 << 20)] = 30.0
    grace_seconds: Annotated[float, Range(0.0, 1 << 20)] = 30.0
    cors_origins: tuple[str, ...] = ()
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    max_cache_bytes: Annotated[int | None, Range(1, 1 << 50)] = None
    media: MediaSettings = field(default_factory=MediaSettings)

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.max_choices:
            object.__setattr__(self, "max_choices", min(64, self.max_queue))
        if self.max_choices > self.max_queue:
            raise InvalidInputError(f"max_choices is {self.max_choices}, and max_queue {self.max_queue}.")
        for name, weight in self.tenant_weights.items():
            check_range(f"The weight of {name}", weight, 0.001, 1000.0)
        for option, name, known in (
            ("tool-parser", self.tool_parser, TOOL_PARSERS),
            ("reasoning-parser", self.reasoning_parser, REASONING_PARSERS),
        ):
            if name not in known:
                raise InvalidInputError(
                    f"There is no {option} {name!r}.", f"Choose one of {', '.join(known)}."
                )
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise InvalidInputError(
                    f"The origin {origin!r} is none.",
                    "Write it as browsers send it: https://host or https://host:port.",
                )
