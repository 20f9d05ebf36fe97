"""Limits of the server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

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
        max_choices: Choices of one request at most; never more than `max_queue`.
        max_body_bytes: Of a request.
        max_prompt_tokens: Of one prompt; None for the model's limit.
        max_reference_tokens: Of the documents and the prediction of one request.
        max_tokens: Of one reply, even if the request asks for more.
        max_tenants: Namespaces at most.
        history_bytes: Memory for the history of each tenant but the default one.
        prefill_chunk: Prompt tokens in one pass at most; other rows step between two of them. Fewer where a
            pass would delay others too long.
        request_seconds: From arrival to the end of the reply.
        stuck_seconds: A step that takes longer turns /health unhealthy.
        unread_tokens: Tokens that may wait for a client that does not read its stream.
        send_seconds: Limit for sending one piece of a stream.
        grace_seconds: Time for running requests to finish when the server stops.
        cors_origins: Web pages' origins that may use the server from a browser; "*" for any. None by default.
        tool_parser: Form in which the model writes calls of tools; "auto" for as its chat template shows.
        reasoning_parser: Marks around its reasoning; the same.
        tenant_weights: Shares of tenants beside the others', by name; 1 for those that are not named.
        max_cache_bytes: Memory for the caches of all that run; what does not fit waits. None for no limit.
        media: Sources of images, and their limits.
    """

    model_name: str
    max_batch: int = 8
    max_queue: int = 256
    max_choices: int = 64
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_reference_tokens: int = 65536
    max_tokens: int = 4096
    max_tenants: int = 64
    history_bytes: int = 1 << 26
    prefill_chunk: int = 512
    request_seconds: float = 600.0
    stuck_seconds: float = 120.0
    unread_tokens: int = 65536
    send_seconds: float = 30.0
    grace_seconds: float = 30.0
    cors_origins: tuple[str, ...] = ()
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    max_cache_bytes: int | None = None
    media: MediaSettings = field(default_factory=MediaSettings)

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, float, float, float], ...] = (
            ("max_batch", self.max_batch, 1, 1024),
            ("max_queue", self.max_queue, 1, 1 << 20),
            ("max_choices", self.max_choices, 1, self.max_queue),
            ("max_body_bytes", self.max_body_bytes, 1024, 1 << 32),
            (
                "max_prompt_tokens",
                1 if self.max_prompt_tokens is None else self.max_prompt_tokens,
                1,
                1 << 30,
            ),
            ("max_reference_tokens", self.max_reference_tokens, 0, 1 << 30),
            ("max_tokens", self.max_tokens, 1, 1 << 30),
            ("max_tenants", self.max_tenants, 1, 4096),
            ("history_bytes", self.history_bytes, 1 << 20, 1 << 40),
            ("prefill_chunk", self.prefill_chunk, 1, 1 << 20),
            ("request_seconds", self.request_seconds, 0.01, 1 << 20),
            ("stuck_seconds", self.stuck_seconds, 0.01, 1 << 20),
            ("unread_tokens", self.unread_tokens, 1, 1 << 30),
            ("send_seconds", self.send_seconds, 0.01, 1 << 20),
            ("grace_seconds", self.grace_seconds, 0.0, 1 << 20),
            ("max_cache_bytes", 1 if self.max_cache_bytes is None else self.max_cache_bytes, 1, 1 << 50),
            *((f"the weight of {name}", each, 0.001, 1000.0) for name, each in self.tenant_weights.items()),
        )
        for name, value, low, high in limits:
            if not low <= value <= high:
                raise InvalidInputError(f"{name} is {value}; it must lie in {low}..{high}.")
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
