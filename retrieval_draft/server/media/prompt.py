"""Model inputs of a conversation with images or sounds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retrieval_draft.server.errors import ApiError
from retrieval_draft.server.media.images import ImageReader
from retrieval_draft.server.media.settings import MediaSettings
from retrieval_draft.server.media.sounds import SoundReader

__all__ = ["MediaPrompt", "MediaPrompts", "refuse_media", "take_urls"]

_log = logging.getLogger("retrieval_draft.server")

Conversation = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class MediaPrompt:
    """A prompt with images or sounds.

    Attributes:
        ids: Token ids.
        inputs: Further inputs of the model, by name.
    """

    ids: Sequence[int]
    inputs: Mapping[str, Tensor]


def take_urls(conversation: Conversation) -> list[tuple[str, str]]:
    """Takes the URLs of images and sounds out of a conversation; their parts stay.

    Returns:
        The type of each part, "image" or "audio", and its URL, in order.
    """
    return [
        (part["type"], part.pop("url"))
        for message in conversation
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] != "text"
    ]


def refuse_media(kind: str) -> ApiError:
    """The answer to a part that the model cannot read.

    Args:
        kind: "image" or "audio".
    """
    field, what = ("image_url", "images") if kind == "image" else ("input_audio", "sound")
    return ApiError(400, f"{field}: this model reads no {what}.", "messages")


class MediaPrompts:
    """Makes prompts with a model's processor.

    Args:
        processor: As of ``AutoProcessor``.
        settings: Allowed sources of images and sounds, and limits.

    Attributes:
        templates: The processor's chat templates by name; one without a name is "default".
        readers: For each type of part that the model reads.
    """

    def __init__(self, processor: Any, settings: MediaSettings) -> None:
        self._processor, self._settings = processor, settings
        given = getattr(processor, "chat_template", None) or {}
        self.templates: Mapping[str, str] = given if isinstance(given, dict) else {"default": given}
        self.readers: dict[str, ImageReader | SoundReader] = {}
        if getattr(processor, "image_processor", None) is not None:
            self.readers["image"] = ImageReader(settings)
        rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", None)
        if rate is not None:
            self.readers["audio"] = SoundReader(settings, int(rate))
            self._sound_options = {"sampling_rate": int(rate)}
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

    def prompt(self, text: str, urls: Sequence[tuple[str, str]], check: Callable[[], object]) -> MediaPrompt:
        """The prompt of a rendered conversation.

        Args:
            text: As rendered.
            urls: Of its images and sounds, as of `take_urls`.
            check: Called before each; may raise.

        Raises:
            ApiError: One is not allowed or cannot be read, or the processor refuses.
        """
        if len(urls) > self._settings.max_images:
            raise ApiError(
                400, f"There are {len(urls)} images; {self._settings.max_images} are allowed.", "messages"
            )
        found: dict[str, list[Any]] = {}
        for kind, url in urls:
            if kind not in self.readers:
                raise refuse_media(kind)
            check()
            found.setdefault(kind, []).append(self.readers[kind].read(url))
        check()
        given: dict[str, Any] = {}
        if "image" in found:
            given["images"] = [found["image"]]
        if "audio" in found:
            given |= {"audio": found["audio"], **self._sound_options}
        try:
            made = self._processor(text=[text], **given, return_tensors="pt", add_special_tokens=False)
        except Exception as error:  # any type: each processor has its own checks
            _log.warning("The processor refuses the images or sounds of a request.", exc_info=True)
            raise ApiError(
                400,
                f"The model's processor refuses them: {type(error).__name__}: {str(error)[:300]}",
                "messages",
            ) from error
        inputs = {
            name: value
            for name, value in made.items()
            if name not in ("input_ids", "attention_mask") and isinstance(value, Tensor)
        }
        return MediaPrompt(made["input_ids"][0].tolist(), inputs)
