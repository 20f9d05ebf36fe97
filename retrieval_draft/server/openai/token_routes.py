"""Tokens of texts and texts of tokens, as vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import Meta, Raw, Struct, field
from msgspec.json import Decoder

from retrieval_draft.http.json_response import Json
from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.json_body import is_absent, read_body
from retrieval_draft.server.openai.api_errors import ERRORS, body_schema
from retrieval_draft.server.openai.chat_replies import ChatReplies
from retrieval_draft.server.openai.chat_request import ChatRequest
from retrieval_draft.server.openai.generation_request import TokenId
from retrieval_draft.server.openai.prepare import tokenize
from retrieval_draft.server.service import Loaded, Service

__all__ = ["DetokenizeRequest", "TokenizeRequest", "token_router"]


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """A text, or a conversation, to tokenize.

    Attributes:
        model: The served model's name.
        prompt: A text; without it `messages` are.
        messages: A conversation.
        add_special_tokens: Whether the tokenizer adds its special tokens; by default to a prompt alone.
        return_token_strs: Whether the tokens are returned as texts too.
        add_generation_prompt: As in chats.
        continue_final_message: As in chats.
        chat_template_kwargs: As in chats.
        tools: As in chats.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Raw, Meta(extra_json_schema={"type": "array"})] = field(default_factory=Raw)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[Raw, Meta(extra_json_schema={"type": "object"})] = field(
        default_factory=Raw
    )
    tools: Annotated[Raw, Meta(extra_json_schema={"type": "array"})] = field(default_factory=Raw)


class DetokenizeRequest(Struct, forbid_unknown_fields=True):
    """Tokens to turn into text, special ones included.

    Attributes:
        tokens: Ids.
        model: The served model's name.
    """

    tokens: list[TokenId]
    model: str | None = None


_TOKENIZE, _DETOKENIZE = Decoder(TokenizeRequest), Decoder(DetokenizeRequest)


def token_router(service: Service) -> APIRouter:
    """The routes of one service."""
    router = APIRouter()

    @router.post("/tokenize", responses=ERRORS, openapi_extra=body_schema("TokenizeRequest"))
    async def tokens(request: Request) -> Response:
        """Tokens of a text, or of a conversation by the chat template."""
        body = await read_body(request, _TOKENIZE)
        service.check_model(body.model)
        has_messages = not is_absent(body.messages)
        if (body.prompt is None) != has_messages:
            raise ApiError(400, "Give a prompt, or else messages.", "messages" if has_messages else "prompt")
        chat = None
        if has_messages:
            asked = ChatRequest(
                messages=body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
                tools=body.tools,
            )
            chat = ChatReplies(service, asked)

        def work(loaded: Loaded) -> dict[str, Any]:
            if chat is None:
                special = body.add_special_tokens is not False
                ids = tokenize(loaded, body.prompt or "", "prompt", special=special)
            else:
                special = bool(body.add_special_tokens)
                ids = list(chat.tokens(loaded, chat.prompt(loaded), special=special)[0])
            names = loaded.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
            most = loaded.drafter.continuous.target.max_positions
            return {"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": names}

        size = len(await request.body())
        return Json(await service.work(request.state.tenant, work, size))

    @router.post("/detokenize", responses=ERRORS, openapi_extra=body_schema("DetokenizeRequest"))
    async def text(request: Request) -> Response:
        """The text of tokens."""
        body = await read_body(request, _DETOKENIZE)
        service.check_model(body.model)

        def work(loaded: Loaded) -> dict[str, Any]:
            end = max(len(loaded.tokenizer), loaded.drafter.continuous.target.embedding_rows)
            if body.tokens and max(body.tokens) >= end:
                raise ApiError(400, f"tokens names {max(body.tokens)}; ids end at {end - 1}.", "tokens")
            decoded = loaded.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)
            return {"prompt": decoded}

        size = len(await request.body())
        return Json(await service.work(request.state.tenant, work, size))

    @router.post("/v1/embeddings", responses={400: ERRORS[400], 401: ERRORS[401]})
    async def embeddings() -> Response:
        """Refused: this server generates text."""
        raise ApiError(
            400, "/v1/embeddings is not supported by this server: its model generates text.", "model"
        )

    return router
