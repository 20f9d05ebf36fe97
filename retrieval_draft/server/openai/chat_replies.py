"""Preparing of chats, for the endpoints that answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.prompt import refuse_media, take_urls
from retrieval_draft.server.openai.chat_request import ChatRequest
from retrieval_draft.server.openai.chat_template import render_chat
from retrieval_draft.server.openai.format import ChatFormat
from retrieval_draft.server.openai.prepare import check_length, prepare_request, tokenize
from retrieval_draft.server.openai.structured_outputs import asked_grammar
from retrieval_draft.server.openai.tool_grammar import tool_grammar
from retrieval_draft.server.scheduler.job import Job
from retrieval_draft.server.service import Loaded, Service

__all__ = ["ChatReplies"]


class ChatReplies:
    """A chat, checked and ready to be prepared on a thread.

    Args:
        service: The served service.
        body: The request.

    Attributes:
        body: As given.
        samples: Choices to draw.
        kept: Choices to return, where more are drawn; else None.
        use: Tools that the reply may call; None for none.

    Raises:
        ApiError: A field is invalid or not supported.
    """

    def __init__(self, service: Service, body: ChatRequest) -> None:
        body.check()
        self._service, self.body = service, body
        self.samples = body.best_of or body.n or 1
        self.kept = body.n or 1 if self.samples > (body.n or 1) else None
        self._conversation, self._variables = body.conversation, body.variables
        self._urls = take_urls(self._conversation)
        self.use = body.tool_use

    def prompt(self, loaded: Loaded) -> str:
        """The conversation as text.

        Raises:
            ApiError: The chat template refuses it, or it has images or sounds and the model reads none.
        """
        body, use, media = self.body, self.use, loaded.media
        template = self._service.chat_template
        if template is None and media is not None:
            template = media.template(use is not None)

        def render(messages: list[dict[str, Any]]) -> str:
            return render_chat(
                loaded.tokenizer,
                messages,
                template,
                self._variables,
                body.add_generation_prompt,
                bool(body.continue_final_message),
                () if use is None else use.shown,
                body.reasoning_effort,
            )

        if media is not None:
            # Without the request's own tools and variables, which the template may refuse.
            plain = partial(render_chat, loaded.tokenizer, template=template)
            return render(media.parts(self._conversation, plain))
        if self._urls:
            raise refuse_media(self._urls[0][0])
        return render(self._conversation)

    def tokens(
        self, loaded: Loaded, text: str, *, special: bool = False
    ) -> tuple[Sequence[int], Mapping[str, Any]]:
        """Token ids of the conversation, and the model's further inputs: those of images and sounds.

        Args:
            loaded: The model's objects and limits.
            text: As of `prompt`.
            special: Whether the tokenizer adds its special tokens to a text alone.

        Raises:
            ApiError: It is too long, or an image or sound is not allowed or cannot be read.
        """
        if not self._urls or loaded.media is None:
            return tokenize(loaded, text, "messages", special=special), {}
        check_length(loaded, text, "messages", loaded.most_prompt_tokens)
        prompt = loaded.media.prompt(text, self._urls, loaded.check)
        return prompt.ids, prompt.inputs

    def prepare(self, job: Job, loaded: Loaded) -> None:
        """Prepares the request.

        Raises:
            ApiError: Something is not supported, or beyond a limit.
        """
        body, use, parsing = self.body, self.use, loaded.parsing
        text = self.prompt(loaded)
        parser = None
        marks: frozenset[str] | None = frozenset()
        if use is not None and not parsing.has_tools:
            raise ApiError(
                400, "This server does not know how its model calls tools; see --tool-parser.", "tools"
            )
        asked, text_before = asked_grammar(body), text
        if use is not None:
            loaded.check()
            asked = tool_grammar(use, parsing, text, loaded.tokenizer, asked)
        if use is not None or parsing.parses:
            if asked is not None and asked.field != "tool_choice" and parsing.template is None:
                text_before = ""  # the rule begins with the reply, which has no reasoning then
            schemas = None if use is None else use.schemas
            parser = parsing.parser(text_before, schemas, use is not None and use.one_call)
            marks = parsing.marks(use is not None)
        ids, inputs = self.tokens(loaded, text)
        top = (body.top_logprobs or 0) if body.logprobs else None
        prepare_request(
            job, body, loaded, [ids], body.wanted_tokens, samples=self.samples,
            competing=self.kept is not None, top_logprobs=top, parser=parser, marks=marks, grammar=asked,
            model_inputs=inputs,
        )  # fmt: skip

    def shape(self, loaded: Loaded, request_id: str) -> ChatFormat:
        """The format of the response."""
        body, last = self.body, self._conversation[-1]
        role = last["role"] if body.add_generation_prompt is False else "assistant"
        return ChatFormat(
            f"chatcmpl-{request_id}",
            body.model or self._service.settings.model_name,
            loaded.texts,
            bool(body.return_token_ids),
            bool(body.logprobs),
            role=role,
            echoed=_text(last["content"]) if body.echo and last["role"] == role else "",
            names_calls=self.use is None or self.use.choice != "function",
        )


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message, without its images and sounds."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
