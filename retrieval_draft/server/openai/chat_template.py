"""Prompts of conversations by the model's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from inspect import signature
from typing import Any

from jinja2 import Environment, meta
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from retrieval_draft.server.errors import ApiError

__all__ = ["render_chat"]

_NONE: Mapping[str, Any] = {}
_NO_TOOLS: Sequence[dict[str, Any]] = ()
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
_SET_ALREADY = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}


def render_chat(
    tokenizer: Any,
    conversation: list[dict[str, Any]],
    template: str | None,
    variables: Mapping[str, Any] = _NONE,
    begins: bool | None = None,
    goes_on: bool = False,
    tools: Sequence[dict[str, Any]] = _NO_TOOLS,
    effort: str | None = None,
) -> str:
    """The prompt of a conversation, up to the start of the reply.

    The role "developer" becomes "system" where the template has no developer.

    Args:
        tokenizer: The model's.
        conversation: Messages with ``role`` and ``content``.
        template: Replaces the tokenizer's own.
        variables: Of the template.
        begins: Whether the prompt ends with the start of an assistant message; None for yes, unless
            `goes_on`.
        goes_on: Whether the reply continues the last message.
        tools: That the model may call.
        effort: The template's variable ``reasoning_effort``.

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
        source: str = tokenizer.get_chat_template(template, tools=list(tools) or None)
        names = _free_names(source)
        if tools and "tools" not in names:
            raise ApiError(
                400,
                "This model's chat template has no tools; start the server with --chat-template.",
                "tools",
            )
        if effort is not None:
            if "reasoning_effort" not in names:
                raise ApiError(
                    400,
                    "This model's chat template has no reasoning_effort; leave it out.",
                    "reasoning_effort",
                )
            variables = {"reasoning_effort": effort, **variables}
        unknown = set(variables) - (names - _SET_ALREADY)
        if unknown:
            raise ApiError(
                400,
                f"chat_template_kwargs: this model's chat template has no {min(unknown)[:64]!r}.",
                "chat_template_kwargs",
            )
        if "developer" not in source:
            conversation = [
                {**each, "role": "system"} if each["role"] == "developer" else each for each in conversation
            ]

        def render(opens: bool) -> str:
            text: str = tokenizer.apply_chat_template(
                conversation,
                tools=list(tools) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=opens,
                continue_final_message=goes_on,
                **variables,
            )
            return text

        text = render(not goes_on if begins is None else begins)
        if begins is False and not goes_on and text == render(True):
            raise ApiError(
                400,
                "add_generation_prompt is false, and this model's chat template has no such prompt.",
                "add_generation_prompt",
            )
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = "with continue_final_message " if goes_on else ""
        raise ApiError(
            400, f"The chat template refuses these messages {what}: {error}", "messages"
        ) from error
    return text


@lru_cache(maxsize=8)
def _free_names(source: str) -> frozenset[str]:
    """Variables of a template, those that transformers sets itself among them."""
    # transformers adds one tag to Jinja's. Nothing is rendered here.
    parser = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
    found = meta.find_undeclared_variables(parser.parse(_GENERATION.sub("", source)))
    return frozenset(found)
