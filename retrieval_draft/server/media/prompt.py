"""Model inputs of a conversation with images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.images import ImageReader
from retrieval_draft.server.media.settings import MediaSettings

__all__ = ["MediaPrompt", "MediaPrompts", "take_urls"]

_log = logging.getLogger("retrieval_draft.server")

Conversation = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class MediaPrompt:
    """A prompt with images.

    Attributes:
        ids: Token ids.
        inputs: Further inputs of the model, by name.
    """

    ids: Sequence[int]
    inputs: Mapping[str, Tensor]


def take_urls(conversation: Conversation) -> list[str]:
    """Takes the URLs of images out of a conversation, in order; their parts stay."""
    return [
        part.pop("url")
        for message in conversation
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image"
    ]


class MediaPrompts:
    """Makes prompts with a model's processor.

    Args:
        processor: As of ``AutoProcessor``.
        settings: Allowed sources of images, and limits.

    Attributes:
        templates: The processor's chat templates by name; one without a name is "default".
        reader: Reads images.
    """

    def __init__(self, processor: Any, settings: MediaSettings) -> None:
        self._processor, self._settings = processor, settings
        given = getattr(processor, "chat_template", None) or {}
        self.templates: Mapping[str, str] = given if isinstance(given, dict) else {"default": given}
        self.reader = ImageReader(settings)
        self._reads_texts: bool | None = None

    def template(self, has_tools: bool) -> str | None:
        """The chat template of a conversation with or without tools; None for the tokenizer's own."""
        return self.templates.get("tool_use" if has_tools else "default", self.templates.get("default"))

    def parts(self, conversation: Conversation, render: Callable[[Conversation], str]) -> Conversation:
        """The conversation in the form that a chat template reads: many for images read no plain texts.

        Args:
            conversation: Messages.
            render: Renders messages by the template alone: the first answer stands for all requests.
        """
        marked = "the text of a message"
        if self._reads_texts is None:
            try:
                self._reads_texts = marked in render([{"role": "user", "content": marked}])
            except ApiError:
                self._reads_texts = False
        if self._reads_texts and not any(isinstance(m["content"], list) for m in conversation):
            return conversation
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in conversation
        ]

    def prompt(self, text: str, urls: Sequence[str], check: Callable[[], object]) -> MediaPrompt:
        """The prompt of a rendered conversation.

        Args:
            text: As rendered.
            urls: Of its images, in order.
            check: Called before each image; may raise.

        Raises:
            ApiError: An image is not allowed or cannot be read, or the processor refuses.
        """
        if len(urls) > self._settings.max_images:
            raise ApiError(
                400, f"There are {len(urls)} images; {self._settings.max_images} are allowed.", "messages"
            )
        images = []
        for url in urls:
            check()
            images.append(self.reader.read(url))
        check()
        try:
            made = self._processor(
                text=[text], images=[images], return_tensors="pt", add_special_tokens=False
            )
        except Exception as error:  # any type: each processor has its own checks
            _log.warning("The processor refuses the images of a request.", exc_info=True)
            raise ApiError(
                400,
                f"The model's processor refuses the images: {type(error).__name__}: {str(error)[:300]}",
                "messages",
            ) from error
        inputs = {
            name: value
            for name, value in made.items()
            if name not in ("input_ids", "attention_mask") and isinstance(value, Tensor)
        }
        return MediaPrompt(made["input_ids"][0].tolist(), inputs)
