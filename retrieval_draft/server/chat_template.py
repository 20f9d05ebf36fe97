"""Conversations as the model was trained to read them."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError

from retrieval_draft.server.errors import ApiError

__all__ = ["render_chat"]


def render_chat(tokenizer: Any, conversation: list[dict[str, Any]], template: str | None) -> str:
    """The prompt of a conversation, up to where the assistant speaks.

    Args:
        tokenizer: The model's.
        conversation: Messages with ``role`` and ``content``.
        template: In place of the tokenizer's own.

    Raises:
        ApiError: There is no template, or it refuses the conversation.
    """
    if template is None and not getattr(tokenizer, "chat_template", None):
        raise ApiError(
            400,
            "This model's tokenizer has no chat template; use /v1/completions, or start the server with "
            "--chat-template.",
            "messages",
        )
    try:
        text: str = tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ApiError(400, f"The chat template refuses these messages: {error}", "messages") from error
    return text
